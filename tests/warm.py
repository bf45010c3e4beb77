"""What each process of a test would begin with, done once in the server that they are forked from (forks.py): imports,
kernels, tables."""
import gc

import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import alf_nb.app.finetune
import alf_nb.core.checkpoints
import alf_nb.study.compare
import alf_nb.train.trainer     # noqa: F401
from alf_nb.demo import demo_model
from alf_nb.kernels.plan import compile_kernels

torch.set_num_threads(1)
demo_model()
get_checkpoint_conversion_mapping("gpt2")
compile_kernels([torch.float32], dot=True)
gc.collect()
gc.freeze()
