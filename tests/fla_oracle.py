"""fla's models, written down a second time: plain loops in float64 over fla's own configuration keys and tensor names.

Nothing here comes from hybrid_models, so that an error there is not repeated. It reproduces the recorded outputs of fla
(test_fla_oracle.py), and stands in for them where other hyperparameters have none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

DEFAULTS = dict(
    norm_eps=1e-6,
    attn=None,
    tie_word_embeddings=False,
    elementwise_affine=True,
    fuse_norm=True,
    use_lower_bound=True,
    use_output_gate=True,
    num_kv_heads=None,
    num_v_heads=None,
    allow_neg_eigval=False,
    output_gate_activation="swish",
    conv_size=4,
)


def rms(x, weight, eps):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x, positions, theta):
    """x [T, h, width]: pair j with j + width / 2. Frequencies are float32 numbers, as fla stores them."""
    frequencies = 1.0 / theta ** (torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1])
    half = x.shape[-1] // 2
    angle = positions[:, None] * frequencies.double()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def convolve(x, weight):
    """x [T, C]; the last tap is the current token."""
    width = weight.shape[-1]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    return sum(padded[w : w + len(x)] * weight[:, 0, w] for w in range(width))


def full_attention(x, w, spec):
    T, d = x.shape
    heads = spec["num_heads"]
    shared, hd = spec.get("num_kv_heads") or heads, d // heads
    q, k, v = (F.linear(x, w[f"{n}_proj.weight"], w.get(f"{n}_proj.bias")) for n in "qkv")
    q, k, v = q.view(T, heads, hd), k.view(T, shared, hd), v.view(T, shared, hd)
    positions = torch.arange(T, dtype=torch.float64)
    q, k = (rotate(z, positions, spec.get("rope_theta", 10000.0)) for z in (q, k))
    out = torch.zeros(T, heads, hd, dtype=torch.float64)
    for i in range(T):
        start = 0 if spec.get("window_size") is None else max(0, i - spec["window_size"] + 1)
        for h in range(heads):
            g = h // (heads // shared)
            p = torch.softmax(k[start : i + 1, g] @ q[i, h] / math.sqrt(hd), 0)
            out[i, h] = p @ v[start : i + 1, g]
    return F.linear(out.flatten(1), w["o_proj.weight"])


def bounded(f, lower_bounds, layer):
    f = torch.sigmoid(f)
    if lower_bounds is None or layer == 0:
        return f
    p = lower_bounds.softmax(0)
    low = (p.cumsum(0) - p[0])[layer]
    return low + (1 - low) * f


def linear_attention(x, w, c, layer, lower_bounds):
    kind, (T, d), eps = c["model_type"], x.shape, c["norm_eps"]
    heads = c.get("num_heads")
    conv = kind != "retnet" and c["use_short_conv"]

    def project(name):
        y = F.linear(x, w[f"{name}_proj.weight"])
        return convolve(y, w[f"{name}_conv1d.weight"]) if conv and f"{name}_conv1d.weight" in w else y

    if kind == "hgrn":
        f = bounded(project("f"), lower_bounds, layer)
        u, h, out = F.silu(project("i")) * (1 - f), torch.zeros(f.shape[1], dtype=torch.float64), []
        for t in range(T):
            h = f[t] * h + u[t]
            out.append(h)
        o = rms(torch.stack(out), w.get("g_norm.weight"), eps) * F.silu(F.linear(x, w["g_proj.weight"]))
        return F.linear(o, w["o_proj.weight"])

    beta = decay = None
    if kind == "hgrn2":
        K = c["expand_ratio"] or d // heads
        heads = d // K
        f = bounded(project("f"), lower_bounds, layer).view(T, heads, K)
        q, k, v, decay = F.silu(project("q")).view(T, heads, K), 1 - f, project("i").view(T, heads, -1), f
    elif kind in ("retnet", "gla"):
        shared = c["num_kv_heads"] or heads
        q, k, v = (project(n) for n in "qkv")
        if conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = q.view(T, heads, -1), k.view(T, shared, -1), v.view(T, shared, -1)
        if kind == "retnet":
            positions = torch.arange(T, dtype=torch.float64)
            q, k = rotate(q, positions, 10000.0), rotate(k, positions, 10000.0)
            decay = (1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))).expand(T, heads)[..., None]
        else:
            low = F.linear(F.linear(x, w["gk_proj.0.weight"]), w["gk_proj.1.weight"], w["gk_proj.1.bias"])
            decay = torch.exp(F.logsigmoid(low) / 16).view(T, shared, -1).repeat_interleave(heads // shared, 1)
        k, v = (z.repeat_interleave(heads // shared, 1) for z in (k, v))
    else:
        values = c["num_v_heads"] or heads
        q, k, v = (F.silu(project(n)) for n in "qkv")
        q, k, v = q.view(T, heads, -1), k.view(T, heads, -1), v.view(T, values, -1)
        q, k = (z / torch.sqrt(z.square().sum(-1, keepdim=True) + 1e-6) for z in (q, k))
        q, k = (z.repeat_interleave(values // heads, 1) for z in (q, k))
        beta = torch.sigmoid(F.linear(x, w["b_proj.weight"])) * (2 if c["allow_neg_eigval"] else 1)
        if kind == "gated_deltanet":
            a = F.linear(x, w["a_proj.weight"]) + w["dt_bias"]
            decay = torch.exp(-w["A_log"].exp() * F.softplus(a))[..., None]
        heads = values
    state, out = torch.zeros(heads, k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(T):
        if decay is not None:
            state = state * decay[t, :, :, None]
        write = v[t]
        if beta is not None:
            write = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * write[:, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(k.shape[-1]))
    o = torch.stack(out)
    if kind == "hgrn2":
        return F.linear(rms(o.flatten(1), w.get("g_norm.weight"), 1e-5), w["o_proj.weight"])
    gated = c["use_output_gate"] if kind in ("retnet", "gla") else c["use_gate"]
    name = (
        "o_norm"
        if kind in ("delta_net", "gated_deltanet")
        else "g_norm_swish_gate"
        if gated and c["fuse_norm"]
        else "g_norm"
    )
    o = rms(o, w.get(f"{name}.weight"), eps).flatten(1)
    if gated:
        g = F.linear(x, w["g_proj.weight"])
        o = o * (torch.sigmoid(g) if c["output_gate_activation"] == "sigmoid" else F.silu(g))
    return F.linear(o, w["o_proj.weight"])


def logits(config: dict, tensors: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """[B, T, vocab] in float64, one row at a time."""
    c = {**DEFAULTS, **config}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    attention = {}
    for spec in [c["attn"]] if isinstance(c["attn"], dict) else c["attn"] or []:
        attention |= dict.fromkeys(spec["layers"], spec)
    bounds = tensors.get("model.lower_bounds") if c["use_lower_bound"] else None
    rows = []
    for ids in input_ids:
        h = tensors["model.embeddings.weight"][ids]
        for i in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{i}."
            w = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            mixer = {n.removeprefix("attn."): t for n, t in w.items() if n.startswith("attn.")}
            x = rms(h, w["attn_norm.weight"], c["norm_eps"])
            if i in attention:
                h = h + full_attention(x, mixer, attention[i])
            else:
                h = h + linear_attention(x, mixer, c, i, bounds)
            x = rms(h, w["mlp_norm.weight"], c["norm_eps"])
            up = F.silu(F.linear(x, w["mlp.gate_proj.weight"])) * F.linear(x, w["mlp.up_proj.weight"])
            h = h + F.linear(up, w["mlp.down_proj.weight"])
        head = "model.embeddings.weight" if c["tie_word_embeddings"] else "lm_head.weight"
        rows.append(F.linear(rms(h, tensors["model.norm.weight"], c["norm_eps"]), tensors[head]))
    return torch.stack(rows)


def make(folder, seed: int = 0, **keys):
    """Write a random checkpoint as fla would; ``keys`` are those of config.json. Returns (config, tensors)."""
    import json

    from safetensors.torch import save_file

    c = {**DEFAULTS, **dict(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=3), **keys}
    kind, d, L = c["model_type"], c["hidden_size"], c["num_hidden_layers"]
    g = torch.Generator().manual_seed(seed)
    tensors = {}

    def matrix(name, *shape, size=None):
        tensors[name] = torch.randn(shape, generator=g) * (size or 1.5 / math.sqrt(shape[-1]))

    def norm(name, width):
        tensors[name] = 0.5 + torch.rand(width, generator=g)

    matrix("model.embeddings.weight", c["vocab_size"], d, size=1.0)
    norm("model.norm.weight", d)
    if not c["tie_word_embeddings"]:
        matrix("lm_head.weight", c["vocab_size"], d)
    attention = {}
    for spec in [c["attn"]] if isinstance(c["attn"], dict) else c["attn"] or []:
        attention |= dict.fromkeys(spec["layers"], spec)
    H = c.get("num_heads")
    for i in range(L):
        p = f"model.layers.{i}."
        norm(p + "attn_norm.weight", d)
        norm(p + "mlp_norm.weight", d)
        matrix(p + "mlp.gate_proj.weight", c["intermediate_size"], d)
        matrix(p + "mlp.up_proj.weight", c["intermediate_size"], d)
        matrix(p + "mlp.down_proj.weight", d, c["intermediate_size"])
        a = p + "attn."
        if i in attention:
            spec = attention[i]
            width = (spec.get("num_kv_heads") or spec["num_heads"]) * d // spec["num_heads"]
            for n, out in (("q", d), ("k", width), ("v", width)):
                matrix(f"{a}{n}_proj.weight", out, d)
                if spec.get("qkv_bias"):
                    matrix(f"{a}{n}_proj.bias", out, size=0.5)
            matrix(a + "o_proj.weight", d, d)
            continue
        gate = True
        if kind == "hgrn":
            D = int(d * c["expand_ratio"])
            mixed, out, width, name = {"i": D, "f": D}, D, D, "g_norm"
        elif kind == "hgrn2":
            mixed, out, width, name, gate = {"q": d, "f": d, "i": d}, d, d, "g_norm", False
        elif kind in ("retnet", "gla"):
            ek, ev, groups = int(d * c["expand_k"]), int(d * c["expand_v"]), H // (c["num_kv_heads"] or H)
            mixed, out, width, gate = {"q": ek, "k": ek // groups, "v": ev // groups}, ev, ev // H, c["use_output_gate"]
            name = "g_norm_swish_gate" if gate and c["fuse_norm"] else "g_norm"
            if kind == "gla":
                matrix(a + "gk_proj.0.weight", 16, d)
                matrix(a + "gk_proj.1.weight", ek // groups, 16, size=1.0)
                matrix(a + "gk_proj.1.bias", ek // groups, size=2.0)
        else:
            if kind == "delta_net":
                qk, V, HV = int(d * c["expand_k"]), int(d * c["expand_v"]) // H, H
            else:
                qk, V, HV = H * c["head_dim"], int(c["head_dim"] * c["expand_v"]), c["num_v_heads"] or H
                matrix(a + "a_proj.weight", HV, d)
                matrix(a + "A_log", HV, size=1.0)
                matrix(a + "dt_bias", HV, size=1.0)
            matrix(a + "b_proj.weight", HV, d)
            mixed, out, width, name, gate = {"q": qk, "k": qk, "v": HV * V}, HV * V, V, "o_norm", c["use_gate"]
        for n, size in mixed.items():
            matrix(f"{a}{n}_proj.weight", size, d)
            if kind != "retnet" and c["use_short_conv"]:
                matrix(f"{a}{n}_conv1d.weight", size, 1, c["conv_size"], size=0.6)
        if gate:
            matrix(a + "g_proj.weight", out, d)
        if c["elementwise_affine"]:
            norm(f"{a}{name}.weight", width)
        matrix(a + "o_proj.weight", d, out)
    if kind in ("hgrn", "hgrn2") and c["use_lower_bound"]:
        matrix("model.lower_bounds", L, int(d * c["expand_ratio"]) if kind == "hgrn" else d, size=1.0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({n: v for n, v in c.items() if n in keys or n in DIMENSIONS}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return c, tensors


DIMENSIONS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
