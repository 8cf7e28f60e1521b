"""What comparing merges on a suite of tasks is made of."""
