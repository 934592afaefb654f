"""Expert parallelism: a plan executed over a mesh, with tokens travelling to the devices that hold their experts.

Sorting and indexing rows under automatic sharding makes XLA gather all tokens, or all experts, on every device. So here everything
between the router's plan and the combined output happens inside `shard_map`:

    home    each device has its tokens, their choices and their weights (tokens.py), or fills its slots (slots.py)
    there   an exchange carries them over mesh axis `expert` (exchanges.py, hops.py); without that axis nothing travels
    expert  the local layouts, `Grouped` or `Batched`, run this device's experts, so every kernel serves here too
    back    outputs return, already summed over the experts of a device, and are summed over devices

Merged experts are the exception: there parameters travel, and tokens stay (merging.py).

Parameters enter split over `expert` as they are stored; shards along `fsdp` are gathered, pieces along `tensor` stay pieces where
the bank's outputs are sums over them (parameters.py). Devices along `tensor` exchange each a share of their common tokens.

With `chunks`, one chunk's exchange can overlap another's experts; TPUs' XLA must be given `overlap_options` to do so, as training does.

Backward passes take the same ways in the opposite direction. What an exchange brought is named 'exchanged' for
`jax.checkpoint_policies.save_only_these_names`, so that rematerialisation need not exchange again.
"""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
