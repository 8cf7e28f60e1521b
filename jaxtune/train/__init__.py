"""Training of classifiers: one compiled step, a loop that resumes bit for bit, LoRA factors."""
