import torch

from attnpack_fx.kernels.aten.rotary import per_slot, rotate


def scores(q, keys, rotary, batch):
    q = q.view(batch, -1, *q.shape[1:])
    dense, last = [], None
    for segment, c, b in keys:
        b = b.unflatten(0, (-1, q.shape[1]))
        part = c[:, None] @ b
        if segment == last:
            dense[-1][:, :, : c.shape[1]] += part
        else:
            dense.append(part)
        last = segment
    dense = torch.cat(dense, 2)
    cos, sin = per_slot(rotary, 0, dense.shape[2])
    k = rotate(dense, cos[:, None], sin[:, None], rotary.interleaved)
    return (q @ k.mT).reshape(batch, -1, k.shape[2])
