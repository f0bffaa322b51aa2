"""Time series classification (the paper's Table 2) by a language model with TimesNet as teacher."""
