"""Reads audio files, resamples them and cuts them into windows."""
