"""Generate text with a tiny Llama on CPU ranks: `torchrun --nproc-per-node 2 examples/06_generate.py`.

Prefill and decode are two parallel modules on the same weights and the same key/value cache, which the pins ask to split by heads
(column, column, column, row), as the planner does by itself for a model that is large enough for it to pay.
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import autotp

PINS = {"*.q_proj": "column", "*.k_proj": "column", "*.v_proj": "column", "*.o_proj": "row"}

dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank builds the same model and the same prompts
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 257, "max_position_embeddings": 64}
one = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
prompts = torch.randint(257, (3, 8))

many = autotp.parallelize_generation(one, batch=3, context=64, pins=PINS)
greedy = many.generate(prompts, max_new_tokens=32)
sampled = many.generate(prompts, max_new_tokens=32, do_sample=True, temperature=0.8, top_p=0.95, seed=7)

expected = prompts
with torch.no_grad():
    for _ in range(32):  # on one device, without a cache
        expected = torch.cat([expected, one(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
assert torch.equal(greedy, expected)

if dist.get_rank() == 0:
    print(f"keys of the first layer: {tuple(many.decode.key_value_cache.keys_0.to_local().shape)} on each rank")
    print(f"decode: {many.plans.decode.memory.cache:.0f} bytes of cache per rank")
    print(f"greedy:  {greedy[0, 8:].tolist()}")
    print(f"sampled: {sampled[0, 8:].tolist()}")
    print("the greedy tokens equal those of one device")
dist.destroy_process_group()
