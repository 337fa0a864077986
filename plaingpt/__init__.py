"""The library that train.py, sample.py, prepare_data.py and tools/ stand on."""
