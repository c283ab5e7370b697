//! Row-wise kernels: norms, activation, dropout, exponentials. No parameters and no threads of their own.
//!
//! Sums run over sixteen fixed lanes, so a result depends neither on the width of the processor's vectors nor on
//! the number of threads. [`with_simd`] runs a kernel with the best instructions that the machine has.

#![allow(clippy::needless_range_loop, reason = "loops over lanes are written for the vectoriser")]

const LANES: usize = 16;

/// Runs `f` compiled for the vectors of AVX2 where the machine has them. `f` must be inlined all the way down
/// (`#[inline(always)]`), else only its call is. Multiplications and additions are never fused, so results are the
/// same without AVX2.
#[inline(always)]
pub fn with_simd<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the one feature that `wide` asks for.
            return unsafe { wide(f) };
        }
    }
    f()
}

/// `e^x` to about 2 units in the last place, without a branch (range reduction and polynomial of Cephes' `expf`).
/// Outside ±87 the result is held at the limits of normal numbers; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to the nearest integer, which then stands in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * scale
}

/// `Σ a·b`.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    fold(&lanes) + tail
}

/// The greatest number of a row; NaN if only NaN is in it.
#[inline(always)]
pub fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[inline(always)]
fn fold(lanes: &[f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    let mut lanes = *lanes;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Replaces each `x` by `e^(x − shift)` and returns their sum.
#[inline(always)]
pub fn exp_sum(row: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in chunks.by_ref() {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - shift);
            lanes[i] += chunk[i];
        }
    }
    let mut tail = 0.0;
    for x in chunks.into_remainder() {
        *x = exp(*x - shift);
        tail += *x;
    }
    fold(&lanes) + tail
}

/// `1 / sqrt(mean(x²) + eps)`, the factor of an RMS norm (Zhang & Sennrich 2019).
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// The gradient of `y = x · inverse_rms(x) · w` for one row: adds to `dw`, and writes `dx` or, with `accumulate`,
/// adds to it. With `r` the inverse root and `n` the row's length,
/// `dx = r·(dy·w) − x·r³/n · Σ(dy·w·x)`.
#[inline(always)]
pub fn rms_norm_backward(
    dx: &mut [f32],
    dw: &mut [f32],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    inverse: f32,
    accumulate: bool,
) {
    let n = x.len();
    let (dy, w, dx, dw) = (&dy[..n], &w[..n], &mut dx[..n], &mut dw[..n]);
    let mut lanes = [0.0f32; LANES];
    for i in 0..n / LANES {
        for l in 0..LANES {
            let j = i * LANES + l;
            lanes[l] += dy[j] * w[j] * x[j];
        }
    }
    let mut sum = fold(&lanes);
    for j in n / LANES * LANES..n {
        sum += dy[j] * w[j] * x[j];
    }
    let factor = sum * inverse * inverse * inverse / n as f32;
    let keep = if accumulate { 1.0 } else { 0.0 };
    for j in 0..n {
        dw[j] += dy[j] * x[j] * inverse;
        dx[j] = keep * dx[j] + (inverse * dy[j] * w[j] - x[j] * factor);
    }
}

/// `out = silu(gate) · up`, the gated activation of SwiGLU (Shazeer 2020).
#[inline(always)]
pub fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

/// Replaces `gate` and `up` by the gradients with respect to them, given `d`, the gradient of [`swiglu`]'s result.
#[inline(always)]
pub fn swiglu_backward(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    for ((g, u), &d) in gate.iter_mut().zip(up).zip(d) {
        let sigmoid = 1.0 / (1.0 + exp(-*g));
        let silu = *g * sigmoid;
        let slope = sigmoid + silu * (1.0 - sigmoid);
        *g = d * *u * slope;
        *u = d * silu;
    }
}

/// Which elements dropout keeps: a function of the seed and the element's number, so that the backward pass and a
/// resumed run see the same ones, whatever thread computes them.
#[derive(Clone, Copy)]
pub struct Dropout {
    key: u32,
    /// Keep where the hash is at least this.
    threshold: u32,
    scale: f32,
}

impl Dropout {
    /// `None` for a `rate` of 0.
    pub fn new(rate: f32, seed: u64, site: u64) -> Option<Self> {
        if rate <= 0.0 {
            return None;
        }
        // splitmix64, to spread seeds and sites that differ in one bit.
        let mut z = seed ^ site.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let key = (z ^ (z >> 31)) as u32;
        Some(Self { key, threshold: (f64::from(rate) * 4_294_967_296.0) as u32, scale: 1.0 / (1.0 - rate) })
    }

    /// `0` or `1 / (1 − rate)` for element number `index`.
    #[inline(always)]
    pub fn factor(self, index: u32) -> f32 {
        let mut h = index.wrapping_mul(0x9e37_79b1) ^ self.key;
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h ^= h >> 16;
        if h >= self.threshold { self.scale } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 3e-7, "{x}: {ours} {exact}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37 && exp(-1e30) >= 0.0);
    }

    #[test]
    fn sums_and_maxima_of_any_length() {
        for n in [0usize, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let exact: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            assert!((f64::from(dot(&x, &x)) - exact).abs() < 1e-5);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut e = x.clone();
            let total = exp_sum(&mut e, 0.5);
            let exact: f64 = x.iter().map(|&v| (f64::from(v) - 0.5).exp()).sum();
            assert!((f64::from(total) - exact).abs() < 1e-4);
        }
    }

    #[test]
    fn dropout_keeps_the_stated_share_and_the_mean() {
        assert!(Dropout::new(0.0, 1, 1).is_none());
        let dropout = Dropout::new(0.3, 7, 3).unwrap();
        let n = 100_000;
        let factors: Vec<f32> = (0..n).map(|i| dropout.factor(i)).collect();
        let kept = factors.iter().filter(|&&f| f > 0.0).count() as f32 / n as f32;
        assert!((kept - 0.7).abs() < 0.01, "{kept}");
        let other = Dropout::new(0.3, 7, 4).unwrap();
        let same = (0..n).filter(|&i| (other.factor(i) > 0.0) == (factors[i as usize] > 0.0)).count() as f32 / n as f32;
        assert!((same - 0.58).abs() < 0.02, "sites are not independent: {same}");
    }
}
