"""Conversations to tokens."""
