"""Monotone rational-quadratic splines, both ways, with the logarithm of the slope, in one pass."""

import math, numpy, torch, torch.nn.functional as F
LEAST=1e-3; UNIT=math.log(math.expm1(1-LEAST))
SMALL=8192
_tables={}
def tables(K,like):
    key=(K,like.dtype,like.device)
    if key not in _tables:
        before=torch.ones(K+1,K,dtype=like.dtype,device=like.device).tril(-1)*(1-K*LEAST)
        floor=torch.arange(K+1,dtype=like.dtype,device=like.device)[:,None]*LEAST
        rows=torch.tensor([[0],[1],[K+1],[K+2],[2*K-1],[2*K]],device=like.device)
        _tables[key]=before.expand(2,K+1,K),floor,rows
    return _tables[key]
def arrays(*tensors):
    small=tensors[0].device.type=='cpu' and tensors[0].shape[-1]<=SMALL
    return (numpy,[t.numpy() for t in tensors]) if small else (torch,tensors)
class S(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, bound, inverse):
        N, K = len(x), (theta.shape[1] + 1) // 3
        before, floor, rows = tables(K, x)
        theta = theta.t().contiguous()                                   # (3K-1, N)
        logits = theta[: 2 * K].view(2, K, N)
        p = (logits - logits.amax(1, keepdim=True)).exp_()
        p /= p.sum(1, keepdim=True)
        knots = torch.baddbmm(floor, before, p)                          # (2, K+1, N)
        u = torch.add(x, bound).mul_(0.5 / bound)
        inside = u.clamp(0, 1)
        passed = torch.le(knots[int(inverse), 1:-1], inside).to(x.dtype) # (K-1, N)
        index = passed.sum(0).long() + rows                              # (6, N)
        four = knots.view(2 * K + 2, N).gather(0, index[:4])
        raw = theta.gather(0, index[4:].clamp_(max=3 * K - 2))
        raw += UNIT
        d = F.softplus(raw)
        d += LEAST
        k = index[0]
        f, (x_, u_, v, four, d, k_) = arrays(x, u, inside, four, d, k)
        (x_k, x_1, y_k, y_1), (d0, d1) = four, d
        d0[k_ == 0] = 1.0
        d1[k_ == K - 1] = 1.0
        w, h = x_1 - x_k, y_1 - y_k
        s = h / w
        bend = d0 + d1 - (s + s)
        if inverse:
            rise = v - y_k
            rb = rise * bend
            b = h * d0 - rb
            sr = s * rise
            disc = b * b + 4 * (h * (s - d0) + rb) * sr
            disc[disc < 0] = 0
            xi = (sr + sr) / (b + f.sqrt(disc))
        else:
            xi = (v - x_k) / w
        rest = 1 - xi
        t = xi * rest
        st = s * t
        alpha = s * xi * xi + d0 * t
        beta = s + bend * t
        n = d1 * xi * xi + (st + st) + d0 * rest * rest
        sb = s / beta
        slope = sb * sb * n
        out = x_k + xi * w if inverse else y_k + h * alpha / beta
        out = out * (2 * bound) - bound
        l = f.log(slope)
        if inverse: l = -l
        outside = u_ != v
        out[outside] = x_[outside]
        l[outside] = 0
        ctx.chain = w, h, d0, d1, xi, rest, t, alpha, beta, n, s, bend, slope, outside, x_k, y_k, k_
        ctx.save_for_backward(p, passed, index, raw)
        ctx.bound, ctx.inverse = bound, inverse
        if f is numpy: out, l = torch.from_numpy(out), torch.from_numpy(l)
        return out, l
    @staticmethod
    def backward(ctx, g_out, g_l):
        p, passed, index, raw = ctx.saved_tensors
        w, h, d0, d1, xi, rest, t, alpha, beta, n, s, bend, slope, outside, x_k, y_k, k = ctx.chain
        _, K, N = p.shape
        B = ctx.bound
        g_T = p.new_zeros(3 * K - 1, N) if False else torch.empty(3 * K - 1, N, dtype=p.dtype, device=p.device)
        table = torch.empty(8, N, dtype=p.dtype, device=p.device)
        f, (go, gl, tab) = arrays(g_out, g_l, table)
        turn = rest - xi
        l_xi = (d1 * xi - d0 * rest + s * turn) / n - bend * turn / beta     # half
        if ctx.inverse:
            g_in = (go * (2*B) - (gl + gl) * l_xi / w) / slope
            gy, gl = -g_in, -gl
        else:
            gy = go * (2 * B)
        q, gb, hb, ab = gl / n, gl / beta, gy * h / beta, alpha / beta
        it2 = 1 - (t + t)
        gs = hb * (xi * xi - ab * it2) + 2 * (gl / s + q * t - gb * it2)
        hab, gt = hb * ab, gb * t
        gt = gt + gt
        gd0 = q * rest * rest + (hb - hab) * t - gt
        gd1 = q * xi * xi - hab * t - gt
        gx = gy * slope + 2 * gl * l_xi / w
        gsw = gs / w
        gw = -(gx * xi + gsw * s)
        gh = gsw + gy * ab
        gd0[k == 0] = 0
        gd1[k == K - 1] = 0
        c = 1 - K * LEAST
        # sum_j p_j g_j: left g * (knot before, its floor taken away) + own g * (size, ..)
        kf = k * LEAST
        Sx = gw * (w - LEAST) - gx * (x_k - kf)
        Sy = gh * (h - LEAST) + gy * (y_k - kf)
        pkx, pky = (w - LEAST), (h - LEAST)
        tab[0] = -c * gx - Sx; tab[1] = c * gy - Sy; tab[2] = -Sx; tab[3] = -Sy
        tab[4] = pkx * (gw - Sx / c); tab[5] = pky * (gh - Sy / c)
        tab[6] = gd0; tab[7] = gd1
        tab[:, outside] = 0
        g = g_T[: 2 * K].view(2, K, N)
        # before the bin: tab[0:2], after it tab[2:4]: after + passed (before - after)
        torch.addcmul(table[2:4, None], passed, (table[:2] - table[2:4])[:, None], out=g[:, : K - 1])
        g[:, K - 1] = table[2:4]
        g *= p
        g_T[2 * K :] = 0
        g_T.scatter_(0, index[0:3:2] - torch.tensor([[0],[1]], device=p.device), table[4:6])
        g_T.scatter_add_(0, index[4:], table[6:] * raw.sigmoid())
        if f is numpy:
            gi = g_in if ctx.inverse else gx
            gi = gi * (0.5 / B)
            gi[outside] = go[outside]
            gi = torch.from_numpy(gi)
        else:
            gi = torch.where(outside, go, (g_in if ctx.inverse else gx) * (0.5 / B))
        return gi, g_T.t(), None, None


def rational_quadratic(x, theta, bound, inverse=False):
    out, l = S.apply(x.reshape(-1), theta.reshape(-1, theta.shape[-1]), float(bound), inverse)
    return out.view(x.shape), l.view(x.shape)
