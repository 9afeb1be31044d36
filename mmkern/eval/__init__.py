"""Zero-shot classification, retrieval, linear probe and robustness."""
