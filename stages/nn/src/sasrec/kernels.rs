//! Element-wise pieces of the network over `f32` slices, forward and backward: layer normalisation, activations,
//! bias, dropout, and an exponential that the compiler can vectorise.
//!
//! Sums run over a fixed number of lanes in a fixed order, so results are the same with and without AVX2. Matrix
//! products live in `matmul`, attention in `attention`.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use rayon::prelude::*;

use super::config::Activation;

/// Compiles a function twice, for the baseline and for AVX2, and picks at run time. Everything it calls must be
/// `#[inline(always)]` to profit.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the only requirement is the feature just detected.
                    return unsafe { wide($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}
pub(super) use vectorised;

/// Number of partial sums of a reduction.
const LANES: usize = 16;

/// `Σ a·b`.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (mut chunks_a, mut chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in chunks_a.by_ref().zip(chunks_b.by_ref()) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(chunks_a.remainder().iter().zip(chunks_b.remainder())) {
        *lane += x * y;
    }
    fold(lanes)
}

/// `Σ a`.
#[inline(always)]
pub(super) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = a.chunks_exact(LANES);
    for x in chunks.by_ref() {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += x;
    }
    fold(lanes)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(super) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = a.chunks_exact(LANES);
    for x in chunks.by_ref() {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// `y += factor · x`.
#[inline(always)]
pub(super) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// `eˣ` to about 2 units in the last place, after Cephes `expf`: reduction by ln 2 in two parts, then a polynomial of
/// degree 6. Clamped to the range of normal numbers; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5·2²³ rounds to the nearest whole number, without an instruction of its own.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // SAFETY: clamping has left a whole number between -126 and 127 (or NaN, for which the result is any number and
    // is then replaced by the product with NaN).
    let n = if n.is_nan() { 0.0 } else { n };
    let power = f32::from_bits(((unsafe { n.to_int_unchecked::<i32>() } + 127) as u32) << 23);
    p * power
}

vectorised! {
    /// Replaces each number by `e^(x - shift)` and returns their sum.
    pub fn exp_shifted(row: &mut [f32], shift: f32) -> f32 {
        for x in row.iter_mut() {
            *x = exp(*x - shift);
        }
        sum(row)
    }
}

vectorised! {
    pub fn row_max(row: &[f32]) -> f32 {
        max(row)
    }
}

vectorised! {
    /// Multiplies each row of `x: [rows, width]` by its factor.
    pub fn scale_rows(x: &mut [f32], factors: &[f32]) {
        let width = x.len() / factors.len().max(1);
        for (row, factor) in x.chunks_exact_mut(width.max(1)).zip(factors) {
            for x in row.iter_mut() {
                *x *= factor;
            }
        }
    }
}

vectorised! {
    /// `y += factor · x`, row by row of `[rows, width]`.
    pub fn add_scaled_rows(y: &mut [f32], factors: &[f32], x: &[f32]) {
        let width = (y.len() / factors.len().max(1)).max(1);
        for ((y, x), &factor) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(factors) {
            add_scaled(y, factor, x);
        }
    }
}

vectorised! {
    /// `y += factor · x`.
    pub fn add_to(y: &mut [f32], factor: f32, x: &[f32]) {
        add_scaled(y, factor, x);
    }
}

vectorised! {
    pub fn dot_product(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

/// Numbers that one thread moves at a time.
const MOVED: usize = 1 << 15;

/// `y += share · (x - y)`, on all threads.
pub fn move_towards(y: &mut [f32], share: f32, x: &[f32]) {
    y.par_chunks_mut(MOVED).zip(x.par_chunks(MOVED)).for_each(|(y, x)| move_some(y, share, x));
}

vectorised! {
    fn move_some(y: &mut [f32], share: f32, x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += share * (x - *y);
        }
    }
}

vectorised! {
    /// `y += x`.
    pub fn add(y: &mut [f32], x: &[f32]) {
        add_scaled(y, 1.0, x);
    }
}

vectorised! {
    /// Adds `bias: [width]` to every row of `x: [rows, width]`.
    pub fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                *x += b;
            }
        }
    }
}

vectorised! {
    /// The gradient of a bias: adds the rows of `grad: [rows, width]` up.
    pub fn add_bias_backward(bias_grad: &mut [f32], grad: &[f32]) {
        for row in grad.chunks_exact(bias_grad.len()) {
            for (b, g) in bias_grad.iter_mut().zip(row) {
                *b += g;
            }
        }
    }
}

const LAYER_NORM_EPSILON: f32 = 1e-5;

vectorised! {
    /// `y = normalised · weight + bias` row by row; keeps `normalised: [rows, width]` and the inverse standard
    /// deviation `inverse: [rows]` for the way back. Ba et al., arXiv 1607.06450.
    pub fn layer_norm(
        y: &mut [f32],
        normalised: &mut [f32],
        inverse: &mut [f32],
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
    ) {
        let width = weight.len();
        let rows = y.chunks_exact_mut(width).zip(normalised.chunks_exact_mut(width)).zip(x.chunks_exact(width));
        for (((y, normalised), x), inverse) in rows.zip(inverse) {
            let mean = sum(x) / width as f32;
            for (n, x) in normalised.iter_mut().zip(x) {
                *n = x - mean;
            }
            let variance = dot(normalised, normalised) / width as f32;
            *inverse = 1.0 / (variance + LAYER_NORM_EPSILON).sqrt();
            for (i, n) in normalised.iter_mut().enumerate() {
                *n *= *inverse;
                y[i] = *n * weight[i] + bias[i];
            }
        }
    }
}

vectorised! {
    /// Adds the gradient with respect to `x` to `x_grad`, and those of weight and bias to theirs.
    pub fn layer_norm_backward(
        x_grad: &mut [f32],
        weight_grad: &mut [f32],
        bias_grad: &mut [f32],
        y_grad: &[f32],
        normalised: &[f32],
        inverse: &[f32],
        weight: &[f32],
    ) {
        let width = weight.len();
        let rows = x_grad.chunks_exact_mut(width).zip(y_grad.chunks_exact(width)).zip(normalised.chunks_exact(width));
        for (((x_grad, y_grad), normalised), inverse) in rows.zip(inverse) {
            let (mut mean, mut projection) = ([0.0f32; LANES], [0.0f32; LANES]);
            for (i, ((g, n), w)) in y_grad.iter().zip(normalised).zip(weight).enumerate() {
                mean[i % LANES] += g * w;
                projection[i % LANES] += g * w * n;
            }
            let (mean, projection) = (fold(mean) / width as f32, fold(projection) / width as f32);
            for i in 0..width {
                weight_grad[i] += y_grad[i] * normalised[i];
                bias_grad[i] += y_grad[i];
                x_grad[i] += (y_grad[i] * weight[i] - mean - normalised[i] * projection) * inverse;
            }
        }
    }
}

/// `√(2/π)` and the cubic coefficient of GELU's tanh form (Hendrycks and Gimpel, arXiv 1606.08415).
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

#[inline(always)]
fn gelu_gate(x: f32) -> f32 {
    // ½(1 + tanh u) = 1 / (1 + e^(-2u)).
    1.0 / (1.0 + exp(-2.0 * GELU.0 * (x + GELU.1 * x * x * x)))
}

vectorised! {
    fn gelu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * gelu_gate(x);
        }
    }
}

vectorised! {
    fn gelu_backward(grad: &mut [f32], x: &[f32]) {
        for (g, &x) in grad.iter_mut().zip(x) {
            let gate = gelu_gate(x);
            let slope = 2.0 * GELU.0 * (1.0 + 3.0 * GELU.1 * x * x);
            *g *= gate + x * gate * (1.0 - gate) * slope;
        }
    }
}

/// `y = activation(x)`.
pub fn activate(activation: Activation, y: &mut [f32], x: &[f32]) {
    match activation {
        Activation::Gelu => gelu(y, x),
        Activation::Relu => y.iter_mut().zip(x).for_each(|(y, &x)| *y = if x > 0.0 { x } else { 0.0 }),
    }
}

/// Turns the gradient of the activation's output into that of its input `x`, in place.
pub fn activate_backward(activation: Activation, grad: &mut [f32], x: &[f32]) {
    match activation {
        Activation::Gelu => gelu_backward(grad, x),
        Activation::Relu => grad.iter_mut().zip(x).for_each(|(g, &x)| *g = if x > 0.0 { *g } else { 0.0 }),
    }
}

vectorised! {
    /// `x *= mask`; does nothing under an empty mask, which stands for "no dropout".
    pub fn apply_mask(x: &mut [f32], mask: &[f32]) {
        if !mask.is_empty() {
            for (x, m) in x.iter_mut().zip(mask) {
                *x *= m;
            }
        }
    }
}

/// A source of dropout masks: one stream a piece of a batch, so that threads cannot change what is drawn.
#[derive(Debug)]
pub struct Dropout {
    rng: ChaCha8Rng,
    bytes: Vec<u8>,
}

impl Dropout {
    /// `step` and `piece` choose the stream.
    pub fn new(seed: u64, step: u64, piece: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step.wrapping_mul(1 << 20).wrapping_add(piece));
        Self { rng, bytes: Vec::new() }
    }

    /// Fills `mask` with 0 (with the given probability, to 1/65536) or the factor that keeps the expectation.
    pub fn fill(&mut self, mask: &mut Vec<f32>, len: usize, probability: f32) {
        mask.clear();
        let threshold = (probability * 65536.0).round() as u32;
        if threshold == 0 {
            return;
        }
        let keep = 65536.0 / (65536 - threshold.min(65535)) as f32;
        self.bytes.resize(2 * len, 0);
        self.rng.fill_bytes(&mut self.bytes);
        mask.extend(
            self.bytes
                .chunks_exact(2)
                .map(|b| if u32::from(u16::from_le_bytes([b[0], b[1]])) < threshold { 0.0 } else { keep }),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 / 10_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - expected) / expected).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        assert!(exp(-1000.0) < 1.7e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element_of_odd_lengths() {
        for n in [0, 1, 15, 16, 17, 40] {
            let a: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            assert_eq!(sum(&a), a.iter().sum::<f32>());
            assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[test]
    fn dropout_drops_the_asked_for_share_and_keeps_the_expectation() {
        let mut mask = Vec::new();
        let mut dropout = Dropout::new(7, 3, 1);
        dropout.fill(&mut mask, 100_000, 0.2);
        let dropped = mask.iter().filter(|m| **m == 0.0).count() as f64 / 1e5;
        assert!((dropped - 0.2).abs() < 0.005, "{dropped}");
        assert!((mask.iter().map(|m| f64::from(*m)).sum::<f64>() / 1e5 - 1.0).abs() < 0.01);
        let first = mask.clone();
        Dropout::new(7, 3, 1).fill(&mut mask, 100_000, 0.2);
        assert_eq!(first, mask, "the same stream again");
        Dropout::new(7, 3, 2).fill(&mut mask, 100_000, 0.2);
        assert_ne!(first, mask, "another piece, another stream");
        dropout.fill(&mut mask, 5, 0.0);
        assert!(mask.is_empty());
    }
}
