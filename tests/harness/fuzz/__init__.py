"""Random command lines and data files for the training job: each has to run, or to be refused by one clear line."""
