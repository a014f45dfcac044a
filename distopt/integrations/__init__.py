"""Integrations of distopt with Accelerate and with the Trainer of transformers."""
