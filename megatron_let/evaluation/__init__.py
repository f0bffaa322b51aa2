"""The paper's evaluation: nine lm-eval tasks, and perplexity over indexed data."""
