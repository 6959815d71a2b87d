"""The limits, the utilisation and the files of this process."""
