"""Just One Byte: zeroth-order descent in which a node sends each projected gradient as one byte.

In round r node m takes K = ``samples`` directions z_mj, each from a seed that all nodes know. It computes two losses on
a batch of its own, at ε = ``eps`` on either side. All nodes send their numbers as codes, and take one common step with
the decoded numbers, their own included (η = ``lr``, λ = ``weight_decay``):

    ĝ_mj = (L_m(θ + ε z_mj) - L_m(θ - ε z_mj)) / 2ε
    θ ← θ - η (λ θ + (1/c) Σ_mj decode(code(ĝ_mj)) z_mj)          c = Σ_m K, or its root

The sum is in the order of (m, j). θ itself is never perturbed: each probe is made from the committed copy, and thrown
away. With ``perturb: on_use`` it is made tensor by tensor as the model's operations take them, to equal bits. So all
nodes hold the same bits, and the codes of a round are all that is needed to repeat it.
Deviations: the code is of one byte, where the authors' has nine bits and is rounded but not used; c = √(Σ_m K) is
theirs, the mean the default here. Seeds come from (run, round, node, sample) instead of clocks; the noise has the same
bits on a CPU and a GPU. A sample whose loss is not finite is dropped, on all nodes alike, and not counted in c. λ
leaves biases and norms out.
Elasticity: θ is shared state. A lost node is not in the round's list, and nothing else changes. A joiner takes θ from a
member, or applies the missed rounds from the log, without a forward pass.
Cost: K bytes from each to each other, N·(N-1)·K in a round whatever P is (``layerwise``: times the layers). The log has
31 bytes a round and 4 + K for each node, and 32 more every ``verify_every`` rounds. State: P values, and the committed
copy (``on_use``: none, but for the largest tensor that an operation takes); no gradient, no moments. 2·K forward passes
(``one_sided``: K + 1), and N·K noise vectors to apply.
Reference: Zelikman et al., "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model
Finetuning Using Shared Randomness", 2023, arXiv:2306.10015.
"""

from __future__ import annotations

from starling.algorithms.zeroth_order.spsa import SPSA


class JustOneByte(SPSA, name="just_one_byte"):
    """Decentralized SPSA with one byte for each estimate; see the module's docstring."""
