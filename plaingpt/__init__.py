"""The library of train.py, sample.py, prepare_data.py and tools/."""
