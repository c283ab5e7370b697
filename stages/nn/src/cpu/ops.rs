//! What stands between the products of a transformer: norms, rotary positions, the gate, softmax, log-sum-exp.
//!
//! Sums run in 16 fixed lanes that are added up pairwise, so that results do not depend on the vector width.

use super::isa::for_every_isa;

const LANES: usize = 16;

/// Adds up 16 lanes, pairwise.
#[inline(always)]
fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ f(x) in 16 lanes.
#[inline(always)]
fn sum_of(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(*value);
    }
    add_lanes(lanes)
}

/// A part of a row that is too short for all lanes.
#[inline(always)]
fn padded(rest: &[f32], with: f32) -> [f32; LANES] {
    let mut lanes = [with; LANES];
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = *value;
    }
    lanes
}

#[inline(always)]
fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = if *value > *lane { *value } else { *lane };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

/// eˣ within 2 units in the last place for −87 ≤ x ≤ 88, 0 below: Cody and Waite's reduction by ln 2, then a
/// polynomial of degree 6 (the coefficients of Cephes' `expf`). Written so that the compiler vectorises it.
#[inline(always)]
#[allow(clippy::manual_clamp, reason = "`clamp` keeps NaN apart, and is not vectorised")]
pub fn exp(x: f32) -> f32 {
    const TO_INTEGER: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
    let clamped = if x < -87.0 {
        -87.0
    } else if x > 88.0 {
        88.0
    } else {
        x
    };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = (r * r).mul_add(p, r) + 1.0;
    // The integer sits in the low bits of `shifted`; moved into the exponent it multiplies by 2ⁿ.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { y * power }
}

#[inline(always)]
fn dot_of(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
    let (xs, ys) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (rest_x, rest_y) = (xs.remainder(), ys.remainder());
    for (x, y) in xs.zip(ys) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(rest_x).zip(rest_y) {
        *lane = x.mul_add(*y, *lane);
    }
    add_lanes(lanes)
}

for_every_isa! {
    /// The inner product of two rows of one length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_of(a, b)
    }
}

for_every_isa! {
    /// The inner products of `x` with the rows of `table` that begin at `starts`.
    pub fn dots(x: &[f32], table: &[f32], starts: &[usize], out: &mut [f32]) {
        for (out, start) in out.iter_mut().zip(starts) {
            *out = dot_of(x, &table[*start..][..x.len()]);
        }
    }
}

for_every_isa! {
    /// `out += Σ factor · row` over the rows of `table` that begin at `starts`, one row after the other.
    pub fn add_scaled(out: &mut [f32], factors: &[f32], table: &[f32], starts: &[usize]) {
        for (factor, start) in factors.iter().zip(starts) {
            for (out, x) in out.iter_mut().zip(&table[*start..]) {
                *out = factor.mul_add(*x, *out);
            }
        }
    }
}

for_every_isa! {
    /// Root mean square norm of every row: `out = x / sqrt(mean(x²) + eps) · weight`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = 1.0 / (sum_of(x, |v| v * v) / width as f32 + eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
    }
}

for_every_isa! {
    /// [`rms_norm`] of each of the heads (as long as `weight`) in place, then their rotary position (`cos`, `sin`: half
    /// a head long, the halves of a head are the pairs), then times `scale`.
    pub fn norm_and_rotate(heads: &mut [f32], weight: &[f32], eps: f32, cos: &[f32], sin: &[f32], scale: f32) {
        let half = weight.len() / 2;
        let (weight_first, weight_second) = weight.split_at(half);
        for head in heads.chunks_exact_mut(weight.len()) {
            let inverse = scale / (sum_of(head, |v| v * v) / head.len() as f32 + eps).sqrt();
            let (first, second) = head.split_at_mut(half);
            for i in 0..half.min(second.len()).min(cos.len()).min(sin.len()) {
                let (a, b) = (first[i] * inverse * weight_first[i], second[i] * inverse * weight_second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

for_every_isa! {
    /// `out = silu(gate) · up`, where a row of `gate_up` holds both side by side, each `width` long, and the rows of
    /// `out` are `stride` apart.
    pub fn gate(gate_up: &[f32], width: usize, out: &mut [f32], stride: usize) {
        for (both, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_mut(stride)) {
            let (gate, up) = both.split_at(width);
            for ((out, g), u) in out[..width].iter_mut().zip(gate).zip(up) {
                *out = g / (1.0 + exp(-g)) * u;
            }
        }
    }
}

for_every_isa! {
    /// Layer norm of every row in place: `(x − mean) / sqrt(variance + eps) · weight + bias` (Ba et al. 2016).
    pub fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
        let width = weight.len();
        for x in x.chunks_exact_mut(width) {
            let mean = sum_of(x, |v| v) / width as f32;
            let scale = 1.0 / (sum_of(x, |v| (v - mean) * (v - mean)) / width as f32 + eps).sqrt();
            for ((x, w), b) in x.iter_mut().zip(weight).zip(bias) {
                *x = ((*x - mean) * scale).mul_add(*w, *b);
            }
        }
    }
}

for_every_isa! {
    /// `x · Φ(x)` in place, Φ being the normal distribution (Hendrycks and Gimpel 2016). The error function is
    /// formula 7.1.26 of Abramowitz and Stegun, at most 1.5e-7 off.
    pub fn gelu(x: &mut [f32]) {
        for x in x.iter_mut() {
            let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
            let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
            let mut p = 1.061_405_4f32;
            p = p.mul_add(t, -1.453_152_1);
            p = p.mul_add(t, 1.421_413_8);
            p = p.mul_add(t, -0.284_496_72);
            p = p.mul_add(t, 0.254_829_6);
            // Half of what erf(z) lacks of 1.
            let tail = 0.5 * p * t * exp(-z * z);
            *x *= if *x < 0.0 { tail } else { 1.0 - tail };
        }
    }
}

for_every_isa! {
    /// The approximation `x / (1 + exp(−2u))`, `u = sqrt(2 / π) · (x + 0.044715 x³)`, which is `x/2 · (1 + tanh u)`.
    pub fn gelu_tanh(x: &mut [f32]) {
        for x in x.iter_mut() {
            let u = 1.595_769 * x.mul_add(0.044_715 * *x * *x, *x);
            *x /= 1.0 + exp(-u);
        }
    }
}

for_every_isa! {
    /// Softmax in place.
    pub fn softmax(row: &mut [f32]) {
        let max = max_of(row);
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = row.as_chunks_mut::<LANES>();
        for chunk in whole {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *value = exp(*value - max);
                *lane += *value;
            }
        }
        let mut last = padded(rest, f32::NEG_INFINITY);
        for (lane, value) in lanes.iter_mut().zip(&mut last) {
            *value = exp(*value - max);
            *lane += *value;
        }
        rest.copy_from_slice(&last[..rest.len()]);
        let scale = 1.0 / add_lanes(lanes);
        for value in row.iter_mut() {
            *value *= scale;
        }
    }
}

for_every_isa! {
    /// The largest value of a row and `Σ exp(value − largest)`.
    pub fn max_and_sum_exp(row: &[f32]) -> (f32, f32) {
        let mut whole = LogSumExp::default();
        add_part(&mut whole, row);
        (whole.max, add_lanes(whole.lanes))
    }
}

for_every_isa! {
    /// Takes the next part of a row into its sum.
    fn add_part(sum: &mut LogSumExp, part: &[f32]) {
        let max = max_of(part);
        if max > sum.max {
            let scale = exp(sum.max - max);
            for lane in &mut sum.lanes {
                *lane *= scale;
            }
            sum.max = max;
        }
        if sum.max == f32::NEG_INFINITY {
            return;
        }
        let (whole, rest) = part.as_chunks::<LANES>();
        for chunk in whole {
            for (lane, value) in sum.lanes.iter_mut().zip(chunk) {
                *lane += exp(value - sum.max);
            }
        }
        for (lane, value) in sum.lanes.iter_mut().zip(padded(rest, f32::NEG_INFINITY)) {
            *lane += exp(value - sum.max);
        }
    }
}

for_every_isa! {
    /// The largest value of a row.
    pub fn max(row: &[f32]) -> f32 {
        max_of(row)
    }
}

/// Values that are compared at once.
const LOOK: usize = 32;

/// Appends the places of a chunk's `flags`, which are 0 or 1, to `places`.
#[inline(always)]
fn note_flags(flags: &[u8; LOOK], first: usize, places: &mut Vec<u32>) {
    if flags.iter().fold(0, |any, flag| any | flag) == 0 {
        return;
    }
    for (word, flags) in flags.as_chunks::<8>().0.iter().enumerate() {
        let mut flags = u64::from_le_bytes(*flags);
        while flags != 0 {
            places.push((first + word * 8) as u32 + flags.trailing_zeros() / 8);
            flags &= flags - 1;
        }
    }
}

for_every_isa! {
    /// The places of the values that are not below `bar`, and are numbers.
    pub fn not_below(values: &[f32], bar: f32, places: &mut Vec<u32>) {
        places.clear();
        for (chunk, part) in values.chunks(LOOK).enumerate() {
            let mut flags = [0; LOOK];
            for (flag, value) in flags.iter_mut().zip(part) {
                *flag = u8::from(*value >= bar);
            }
            note_flags(&flags, chunk * LOOK, places);
        }
    }
}

for_every_isa! {
    /// As [`not_below`], with a bar for each value.
    pub fn not_below_each(values: &[f32], bars: &[f32], places: &mut Vec<u32>) {
        places.clear();
        for (chunk, (part, bars)) in values.chunks(LOOK).zip(bars.chunks(LOOK)).enumerate() {
            let mut flags = [0; LOOK];
            for ((flag, value), bar) in flags.iter_mut().zip(part).zip(bars) {
                *flag = u8::from(value >= bar);
            }
            note_flags(&flags, chunk * LOOK, places);
        }
    }
}

/// `log Σ exp` of a row that arrives in parts; the parts' order and sizes must be the same for equal results.
#[derive(Debug, Clone, Copy)]
pub struct LogSumExp {
    max: f32,
    /// The sum so far, of `exp(value − max)`.
    lanes: [f32; LANES],
}

impl Default for LogSumExp {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, lanes: [0.0; LANES] }
    }
}

impl LogSumExp {
    pub fn add(&mut self, part: &[f32]) {
        add_part(self, part);
    }

    pub fn value(&self) -> f32 {
        self.max + add_lanes(self.lanes).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_2_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -86_999..88_000i32 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst}");
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn log_sum_exp_in_parts_is_that_of_the_whole() {
        let row: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 * 0.3 - 10.0).collect();
        let exact = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        let mut parts = LogSumExp::default();
        row.chunks(128).for_each(|part| parts.add(part));
        assert!((f64::from(parts.value()) - exact).abs() < 1e-5, "{} against {exact}", parts.value());
    }

    #[test]
    fn softmax_sums_to_1_and_leaves_out_what_is_masked() {
        let mut row: Vec<f32> = (0..45).map(|i| i as f32 * 0.1).collect();
        row[3] = f32::NEG_INFINITY;
        softmax(&mut row);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(row[3], 0.0);
    }

    #[test]
    fn places_of_what_is_not_below_a_bar() {
        let values: Vec<f32> = (0..70).map(|i| if i == 40 { f32::NAN } else { (i % 35) as f32 }).collect();
        let mut places = Vec::new();
        not_below(&values, 33.0, &mut places);
        assert_eq!(places, [33, 34, 68, 69]);
        let bars: Vec<f32> = (0..70).map(|i| if i == 50 { 15.0 } else { 34.0 }).collect();
        not_below_each(&values, &bars, &mut places);
        assert_eq!(places, [34, 50, 69]);
    }

    #[test]
    fn layer_norm_leaves_mean_and_spread_as_asked() {
        let mut row: Vec<f32> = (0..37).map(|i| (i * i) as f32 * 0.1).collect();
        layer_norm(&mut row, &[2.0; 37], &[3.0; 37], 0.0);
        let mean = row.iter().sum::<f32>() / 37.0;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 37.0;
        assert!((mean - 3.0).abs() < 1e-5 && (variance - 4.0).abs() < 1e-4, "{mean} {variance}");
    }

    #[test]
    fn gelu_is_x_times_the_normal_distribution() {
        // The integral of the density, by Simpson's rule.
        let phi = |x: f64| {
            let steps = 2000;
            let width = x / f64::from(steps);
            let density = |i: i32| (-(f64::from(i) * width).powi(2) / 2.0).exp() / std::f64::consts::TAU.sqrt();
            let inner: f64 = (1..steps).map(|i| density(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
            0.5 + (density(0) + inner + density(steps)) * width / 3.0
        };
        for i in -80..=80i32 {
            let x = f64::from(i) * 0.1;
            let (mut exact, mut tanh) = ([x as f32], [x as f32]);
            gelu(&mut exact);
            gelu_tanh(&mut tanh);
            assert!((f64::from(exact[0]) - x * phi(x)).abs() < 1e-6, "{x}: {}", exact[0]);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            assert!((f64::from(tanh[0]) - 0.5 * x * (1.0 + u.tanh())).abs() < 1e-6, "{x}: {}", tanh[0]);
        }
    }

    #[test]
    fn dot_adds_every_element_once() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &[2.0; 37]), 2.0 * 36.0 * 37.0 / 2.0);
    }
}
