//! Rotary positions: the cosines and sines that queries and keys are turned by.

use super::Config;

/// Positions whose angles are kept; further ones are computed when asked for, by the same formula.
const KEPT: usize = 4096;

/// `cos` and `sin` of `position / theta^(2i / head_dim)` for every `i` of half a head.
pub struct Rotary {
    frequencies: Vec<f32>,
    /// For every kept position, half a head of cosines, then of sines.
    table: Vec<f32>,
}

impl Rotary {
    pub fn new(config: &Config) -> Self {
        let half = config.head_dim / 2;
        // In f32 at the places where transformers rounds to f32, because cosines of large angles show it.
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1.0 / (config.rope_theta.powf((2 * i) as f64 / config.head_dim as f64) as f32)).collect();
        let mut rotary = Self { frequencies, table: Vec::new() };
        let mut table = vec![0.0; config.max_positions.min(KEPT) * 2 * half];
        for (position, slot) in table.chunks_exact_mut(2 * half).enumerate() {
            rotary.compute(position, slot);
        }
        rotary.table = table;
        rotary
    }

    fn compute(&self, position: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.frequencies.len());
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
            let angle = f64::from(position as f32 * frequency);
            (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
        }
    }

    /// Half a head of cosines, then of sines, for `position`; `buffer` is used where they are not kept.
    pub fn at<'a>(&'a self, position: usize, buffer: &'a mut Vec<f32>) -> (&'a [f32], &'a [f32]) {
        let half = self.frequencies.len();
        let start = position * 2 * half;
        let row = match self.table.get(start..start + 2 * half) {
            Some(row) => row,
            None => {
                buffer.resize(2 * half, 0.0);
                self.compute(position, buffer);
                buffer
            }
        };
        row.split_at(half)
    }
}
