"""The mathematics of the project in float64 numpy, on a few pages.

Every OpenCL operation is tested against the function of the same name here: ``conv_forward`` of ``kernels/conv.cl``
and ``ops/conv.py`` computes ``reference.conv_forward``. Written to be checked by hand: clarity comes before speed.

Images are NCHW. Arguments of any dtype are taken to float64 first, and nothing is changed in place. ``dy`` is the
gradient of the loss by a function's output; a backward function returns the gradient by one of its inputs. ``valid``
is the number of leading images that are real (``None``: all). A short last batch leaves the rest of its buffers unused,
and what lies there counts nowhere, neither in a sum nor in a gradient.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

Moments = tuple[int, np.ndarray, np.ndarray]
Shape4 = tuple[int, int, int, int]


def _f64(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _per_channel(values: ArrayLike) -> np.ndarray:
    """[C] shaped so that it broadcasts over [N, C, H, W]."""
    return _f64(values)[:, None, None]


def _outputs(image: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int) -> tuple[int, int]:
    """How many windows fit, down and across; what a stride leaves over at the far edge is not looked at."""
    (height, width), (kh, kw) = image, kernel
    return (height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1


def _pad(x: np.ndarray, padding: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(padding, padding)] * 2)


def _crop(x: np.ndarray, padding: int) -> np.ndarray:
    """The inverse of `_pad`, and its gradient."""
    return x[..., padding : x.shape[-2] - padding, padding : x.shape[-1] - padding]


def _taps(kernel: tuple[int, int], stride: int, outputs: tuple[int, int]) -> Iterator[tuple[int, int, tuple]]:
    """The taps (i, j) of a window in scan order; ``padded[view]`` is what the tap sees, one value per output."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i, i + stride * (outputs[0] - 1) + 1, stride)
            columns = slice(j, j + stride * (outputs[1] - 1) + 1, stride)
            yield i, j, (..., rows, columns)


# Convolution: y[n,o,h,w] = sum over c,i,j of w[o,c,i,j] * x[n, c, stride*h + i - padding, stride*w + j - padding],
# with x zero outside the image, and c running over the C/groups input channels of o's group.
# Goodfellow, Bengio, Courville, Deep Learning (2016), eqs. 9.8 (forward), 9.11 (weights), 9.13 (data);
# groups: Xie et al. 2017 (arXiv:1611.05431), section 3.3.


def _grouped(a: np.ndarray, groups: int, axis: int) -> np.ndarray:
    """A view with the channel axis, of length C, split into two of lengths groups and C / groups."""
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def conv_forward(x: ArrayLike, w: ArrayLike, stride: int = 1, padding: int = 0, groups: int = 1) -> np.ndarray:
    """x[N,C,H,W], w[O,C/groups,kh,kw] -> y[N,O,(H+2*padding-kh)//stride+1,(W+2*padding-kw)//stride+1]."""
    x, w = _f64(x), _f64(w)
    outputs = _outputs(x.shape[2:], w.shape[2:], stride, padding)
    padded, weight = _grouped(_pad(x, padding), groups, axis=1), _grouped(w, groups, axis=0)
    y = np.zeros((x.shape[0], groups, w.shape[0] // groups, *outputs))
    for i, j, view in _taps(w.shape[2:], stride, outputs):
        y += np.einsum("goc,ngchw->ngohw", weight[..., i, j], padded[view])
    return y.reshape(x.shape[0], w.shape[0], *outputs)


def conv_backward_data(
    dy: ArrayLike, w: ArrayLike, x_shape: Shape4, stride: int = 1, padding: int = 0, groups: int = 1
) -> np.ndarray:
    """dy[N,O,Ho,Wo], w[O,C/groups,kh,kw] -> dx[N,C,H,W]: each tap hands its share back to the pixel it saw."""
    dy, w = _f64(dy), _f64(w)
    upstream, weight = _grouped(dy, groups, axis=1), _grouped(w, groups, axis=0)
    padded = _grouped(_pad(np.zeros(x_shape), padding), groups, axis=1)
    for i, j, view in _taps(w.shape[2:], stride, dy.shape[2:]):
        padded[view] += np.einsum("goc,ngohw->ngchw", weight[..., i, j], upstream)
    return _crop(padded, padding).reshape(x_shape)


def conv_backward_weight(
    dy: ArrayLike, x: ArrayLike, w_shape: Shape4, stride: int = 1, padding: int = 0, groups: int = 1
) -> np.ndarray:
    """dy[N,O,Ho,Wo], x[N,C,H,W] -> dw[O,C/groups,kh,kw]: dy times what the tap saw, over images and positions."""
    dy, x = _f64(dy), _f64(x)
    upstream, padded = _grouped(dy, groups, axis=1), _grouped(_pad(x, padding), groups, axis=1)
    dw = _grouped(np.zeros(w_shape), groups, axis=0)
    for i, j, view in _taps(w_shape[2:], stride, dy.shape[2:]):
        dw[..., i, j] = np.einsum("ngohw,ngchw->goc", upstream, padded[view])
    return dw.reshape(w_shape)


# Batch normalisation (Ioffe, Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2), cut where replicas have to agree:
# statistics -> merge over the replicas -> apply, and backward_reduce -> sum over the replicas -> backward.


def batchnorm_statistics(x: ArrayLike, valid: int | None = None) -> Moments:
    """x[N,C,H,W] -> (count, mean[C], m2[C]): values per channel, their mean, their summed squared deviations.

    The biased variance is m2 / count. No valid images give (0, 0, 0), the neutral element of `batchnorm_merge`.
    """
    x = _f64(x)[:valid]
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = x.sum(axis=(0, 2, 3)) / max(count, 1)
    m2 = ((x - _per_channel(mean)) ** 2).sum(axis=(0, 2, 3))
    return count, mean, m2


def batchnorm_merge(a: Moments, b: Moments) -> Moments:
    """The statistics of the union of two samples, without the cancellation of E[x^2] - E[x]^2.

    Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count = count_a + count_b
    delta = _f64(mean_b) - _f64(mean_a)
    share_b = count_b / max(count, 1)
    return count, mean_a + delta * share_b, _f64(m2_a) + _f64(m2_b) + delta**2 * count_a * share_b


def batchnorm_apply(
    x: ArrayLike, mean: ArrayLike, var: ArrayLike, weight: ArrayLike, bias: ArrayLike, eps: float = 1e-5
) -> np.ndarray:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with the batch's biased variance or the running one."""
    xhat = (_f64(x) - _per_channel(mean)) / np.sqrt(_per_channel(var) + eps)
    return xhat * _per_channel(weight) + _per_channel(bias)


def batchnorm_backward_reduce(
    dy: ArrayLike, x: ArrayLike, mean: ArrayLike, invstd: ArrayLike, valid: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(sum_dy[C], sum_dy_xhat[C]), xhat = (x - mean) * invstd: they are also the gradients of bias and of weight."""
    dy, x = _f64(dy)[:valid], _f64(x)[:valid]
    xhat = (x - _per_channel(mean)) * _per_channel(invstd)
    return dy.sum(axis=(0, 2, 3)), (dy * xhat).sum(axis=(0, 2, 3))


def batchnorm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike,
    sum_dy: ArrayLike,
    sum_dy_xhat: ArrayLike,
    count: int,
    valid: int | None = None,
) -> np.ndarray:
    """dx[N,C,H,W] = weight * invstd * (dy - sum_dy/count - xhat * sum_dy_xhat/count), zero for images beyond valid.

    The sums and the count are those over all the replicas whose statistics were merged. The closed form follows from
    section 3 of the paper, with the gradients by mean and variance put in.
    """
    dy, x = _f64(dy), _f64(x)
    dx = np.zeros(x.shape)
    xhat = (x[:valid] - _per_channel(mean)) * _per_channel(invstd)
    share = 1.0 / max(count, 1)
    centred = dy[:valid] - _per_channel(sum_dy) * share - xhat * _per_channel(sum_dy_xhat) * share
    dx[:valid] = _per_channel(weight) * _per_channel(invstd) * centred
    return dx


def batchnorm_running(
    running_mean: ArrayLike, running_var: ArrayLike, count: int, mean: ArrayLike, m2: ArrayLike, momentum: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """running + momentum * (batch - running) for the mean and the unbiased variance m2 / (count - 1), as in PyTorch.

    A count of 0 (a replica without samples) changes nothing; a count of 1 has no variance and is taken as 0.
    """
    running_mean, running_var = _f64(running_mean), _f64(running_var)
    if count == 0:
        return running_mean.copy(), running_var.copy()
    variance = _f64(m2) / max(count - 1, 1)
    return running_mean + momentum * (_f64(mean) - running_mean), running_var + momentum * (variance - running_var)


def relu_forward(x: ArrayLike) -> np.ndarray:
    """max(x, 0); NaN stays NaN."""
    return np.maximum(_f64(x), 0.0)


def relu_backward(dy: ArrayLike, y: ArrayLike) -> np.ndarray:
    """dy where the output y is positive, else 0 (so also where the input was exactly 0)."""
    return np.where(_f64(y) > 0.0, _f64(dy), 0.0)


def residual_add(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """a + b, whose gradient by either is dy itself. He et al. 2016 (arXiv:1512.03385), eq. 1: y = relu(F(x) + x)."""
    return _f64(a) + _f64(b)


def shortcut_forward(x: ArrayLike, out_channels: int, stride: int) -> np.ndarray:
    """x[N,C,H,W] -> y[N,out_channels,ceil(H/stride),ceil(W/stride)]: every stride-th pixel, zero channels after the C.

    The parameter-free shortcut: option A of He et al. 2016, section 3.3.
    """
    seen = _f64(x)[:, :, ::stride, ::stride]
    return np.pad(seen, [(0, 0), (0, out_channels - seen.shape[1]), (0, 0), (0, 0)])


def shortcut_backward(dy: ArrayLike, x_shape: Shape4, stride: int) -> np.ndarray:
    """dx[N,C,H,W]: the gradient of the first C channels at the pixels that were looked at, 0 elsewhere."""
    dx = np.zeros(x_shape)
    dx[:, :, ::stride, ::stride] = _f64(dy)[:, : x_shape[1]]
    return dx


def pool_max_forward(x: ArrayLike, kernel: int, stride: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x[N,C,H,W] -> (y, index), both [N,C,Ho,Wo]: each window's largest value, and the tap kernel*i + j it sits at.

    The scan is PyTorch's: row by row, the first of equal values wins, a NaN wins over everything before it. Padding is
    never chosen, which asks for padding <= kernel / 2. The index counts within the window, so a byte can hold it.
    """
    x = _f64(x)
    outputs = _outputs(x.shape[2:], (kernel, kernel), stride, padding)
    padded, inside = _pad(x, padding), _pad(np.ones(x.shape), padding)
    y = np.full((*x.shape[:2], *outputs), -np.inf)
    index = np.full(y.shape, -1)
    for i, j, view in _taps((kernel, kernel), stride, outputs):
        candidate = padded[view]
        wins = (inside[view] > 0) & ((index < 0) | (candidate > y) | np.isnan(candidate))
        y[wins], index[wins] = candidate[wins], kernel * i + j
    return y, index


def pool_max_backward(
    dy: ArrayLike, index: ArrayLike, x_shape: Shape4, kernel: int, stride: int, padding: int = 0
) -> np.ndarray:
    """dx[N,C,H,W]: each dy goes to the pixel its window chose; windows that chose the same pixel add up there."""
    dy, index = _f64(dy), np.asarray(index)
    padded = _pad(np.zeros(x_shape), padding)
    for i, j, view in _taps((kernel, kernel), stride, dy.shape[2:]):
        padded[view] += np.where(index == kernel * i + j, dy, 0.0)
    return _crop(padded, padding)


def pool_average_forward(x: ArrayLike) -> np.ndarray:
    """x[N,C,H,W] -> y[N,C], the mean of each plane. Global average pooling, Lin et al. 2014, arXiv:1312.4400."""
    return _f64(x).mean(axis=(2, 3))


def pool_average_backward(dy: ArrayLike, x_shape: Shape4) -> np.ndarray:
    """dy[N,C] -> dx[N,C,H,W] = dy / (H*W)."""
    share = _f64(dy) / (x_shape[2] * x_shape[3])
    return np.broadcast_to(share[:, :, None, None], x_shape).copy()


def linear_forward(x: ArrayLike, w: ArrayLike, b: ArrayLike) -> np.ndarray:
    """x[N,I], w[O,I], b[O] -> y[N,O] = x w^T + b."""
    return _f64(x) @ _f64(w).T + _f64(b)


def linear_backward_data(dy: ArrayLike, w: ArrayLike) -> np.ndarray:
    """dy[N,O], w[O,I] -> dx[N,I]."""
    return _f64(dy) @ _f64(w)


def linear_backward_weight(dy: ArrayLike, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """dy[N,O], x[N,I] -> (dw[O,I], db[O])."""
    dy = _f64(dy)
    return dy.T @ _f64(x), dy.sum(axis=0)


# Softmax cross-entropy against t = (1 - smoothing) * onehot(label) + smoothing / K,
# label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567), section 7, and in PyTorch's CrossEntropyLoss.


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _target(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    """labels[N] -> the distribution t[N,K] that the network is asked for."""
    onehot = labels[:, None] == np.arange(classes)
    return (1.0 - smoothing) * onehot + smoothing / classes


def loss_forward(logits: ArrayLike, labels: ArrayLike, smoothing: float = 0.0, valid: int | None = None) -> np.ndarray:
    """logits[N,K], labels[N] in 0..K-1 -> loss[N] = -sum over k of t_k * log softmax_k, per sample; 0 beyond valid."""
    logits, labels = _f64(logits), np.asarray(labels)[:valid]
    loss = np.zeros(len(logits))
    loss[:valid] = -(_target(labels, logits.shape[1], smoothing) * _log_softmax(logits[:valid])).sum(axis=1)
    return loss


def loss_backward(
    logits: ArrayLike, labels: ArrayLike, smoothing: float = 0.0, scale: float = 1.0, valid: int | None = None
) -> np.ndarray:
    """dlogits[N,K] = scale * (softmax(logits) - t), Bishop 2006, eq. 4.109; 0 beyond valid.

    The scale carries what the per-sample loss is multiplied by: the loss scale over the global number of samples.
    """
    logits, labels = _f64(logits), np.asarray(labels)[:valid]
    dlogits = np.zeros(logits.shape)
    softmax = np.exp(_log_softmax(logits[:valid]))
    dlogits[:valid] = scale * (softmax - _target(labels, logits.shape[1], smoothing))
    return dlogits


def loss_correct(logits: ArrayLike, labels: ArrayLike, valid: int | None = None) -> np.ndarray:
    """correct[N], 1 where the label is the first largest logit, else 0; a row with a NaN and one beyond valid are 0."""
    logits, labels = _f64(logits), np.asarray(labels)[:valid, None]
    correct = np.zeros(len(logits), dtype=np.int64)
    rows = logits[:valid]
    chosen = np.take_along_axis(rows, labels, axis=1)
    earlier = np.arange(logits.shape[1]) < labels
    correct[:valid] = np.where(earlier, rows < chosen, rows <= chosen).all(axis=1)
    return correct


