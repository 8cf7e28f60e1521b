"""Many fine-tunes of one base become one model by what a few examples say."""
