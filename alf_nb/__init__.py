"""Which layers of my model should learn? Adaptive layer-wise fine-tuning (ALF) of Hugging Face transformers."""
__version__ = "0.1.0"
