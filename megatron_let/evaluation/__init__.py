"""The paper's evaluation: nine tasks by lm-eval, and perplexity over indexed data."""
