"""The golden trace again, by another program: HSTU, its loss and AdamW from the paper's equations in JAX (float64), on padded batches,
gradients by automatic differentiation; Philox4x32-10 from its paper. Shared with the library are the initial weights and the batches:

    HSTU_GOLDEN_INPUTS=/tmp/inputs.json npx vitest run test/train/golden.test.ts
    python3 test/train/golden.py /tmp/inputs.json          # needs jax
"""
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
MASK = np.uint64(0xFFFFFFFF)


def philox(offset, count):
    """Words of the draw of `count` that begins at counter `offset`, key 0 (Salmon et al., SC 2011)."""
    counter = np.arange((count + 3) // 4, dtype=np.uint64) + np.uint64(offset)
    c0, c1 = counter & MASK, counter >> np.uint64(32)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = 0, 0
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & MASK, (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], 1).reshape(-1)[:count]


class Draws:
    offset = 0

    def take(self, count):
        words = philox(self.offset, count)
        self.offset += (count + 3) // 4
        return words

    def keep(self, shape, p):
        """Dropout's factors: 0 or 1 / (1 - p)."""
        return ((self.take(int(np.prod(shape))) >= np.uint64(p * 2**32)) / (1 - p)).reshape(shape)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def unit(x):
    return x / jnp.maximum(jnp.sqrt((x * x).sum(-1, keepdims=True)), 1e-6)


def loss_of(p, batch, draws, config):
    ids, targets = np.array(batch["ids"]), np.array(batch["targets"])
    lengths = np.diff(batch["offsets"])
    T, B, L = len(ids), len(lengths), int(lengths.max())
    d, H, D, N = config["dim"], config["heads"], config["qkDim"], config["paddedLength"]
    user = np.repeat(np.arange(B), lengths)
    place = np.arange(T) - np.repeat(np.array(batch["offsets"])[:-1], lengths)

    def padded(x):
        return jnp.zeros((B, L, *x.shape[1:]), jnp.asarray(x).dtype).at[user, place].set(x)

    x = p["items"][ids] * np.sqrt(d) + p["positions"][place]
    x = x * draws.keep((T, d), config["inputDropout"])
    i, j = np.indices((L, L))
    key_time, query_time = padded(np.array(batch["times"])), padded(np.array(batch["queryTimes"]))
    gap = jnp.maximum(jnp.abs(query_time[:, :, None] - key_time[:, None, :]), 1)
    bucket = jnp.floor(jnp.log(gap) / 0.301).astype(int)
    for layer in range(config["layers"]):
        w = {name: p[f"layers.{layer}.{name}"] for name in ("uvqk", "output", "outputBias", "positionBias", "timeBias")}
        u, v, q, k = (jax.nn.silu(z).reshape(T, H, D) for z in jnp.split(layer_norm(x) @ w["uvqk"], 4, -1))
        scores = jnp.einsum("bihd,bjhd->bhij", padded(q), padded(k))
        scores += (w["positionBias"][0][np.maximum(i - j, 0)] + w["timeBias"][0][bucket])[:, None]
        weights = jnp.where(j <= i, jax.nn.silu(scores), 0) / N
        o = jnp.einsum("bhij,bjhd->bihd", weights, padded(v))[user, place]
        gated = (u.reshape(T, H * D) * layer_norm(o.reshape(T, H * D))) * draws.keep((T, H * D), config["linearDropout"])
        x = x + gated @ w["output"] + w["outputBias"]
    items = config["numItems"]
    negatives = 1 + ((draws.take(T * 128) * np.uint64(items)) >> np.uint64(32)).astype(int).reshape(T, 128)
    logits = unit(x) @ unit(p["items"]).T / 0.05
    positive = jnp.take_along_axis(logits, targets[:, None], 1)
    others = jnp.where(negatives == targets[:, None], -5e4, jnp.take_along_axis(logits, negatives, 1))
    return (jax.nn.logsumexp(jnp.concatenate([positive, others], 1), axis=1) - positive[:, 0]).mean()


def main(path):
    inputs = json.loads(pathlib.Path(path).read_text())
    golden = json.loads(pathlib.Path(__file__).with_name("golden.json").read_text())["steps"]
    p = {name: jnp.array(w["data"]).reshape(w["shape"]) for name, w in inputs["parameters"].items()}
    m, v = ({name: jnp.zeros_like(w) for name, w in p.items()} for _ in range(2))
    draws, worst = Draws(), 0.0
    for step, (batch, expected) in enumerate(zip(inputs["batches"], golden, strict=True), 1):
        offset = draws.offset

        def loss_from_here(parameters):
            draws.offset = offset
            return loss_of(parameters, batch, draws, inputs["config"])

        loss, gradients = jax.value_and_grad(loss_from_here)(p)
        norms = {name: float(jnp.linalg.norm(g)) for name, g in gradients.items()}
        errors = [abs(float(loss) / expected["loss"] - 1), abs(np.linalg.norm(list(norms.values())) / expected["norm"] - 1)]
        errors += [abs(norms[name] / norm - 1) for name, norm in expected["norms"].items()]
        print(f"step {step:2}: loss {float(loss):.15g}, relative errors: loss {errors[0]:.1e}, norm {errors[1]:.1e}, worst {max(errors):.1e}")
        worst = max(worst, *errors)
        for name, g in gradients.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.98 * v[name] + 0.02 * g * g
            p[name] = p[name] - 1e-3 * (m[name] / (1 - 0.9**step)) / (jnp.sqrt(v[name] / (1 - 0.98**step)) + 1e-8)
    if worst > 1e-9:
        sys.exit(f"the trace differs by {worst:.1e}")


main(sys.argv[1])
