"""Clips and prompts: manifests, audio files and the words of a prompt."""
