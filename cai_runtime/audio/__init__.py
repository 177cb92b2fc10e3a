"""Audio: files read, resampled and cut into windows."""
