//! Adam (Kingma and Ba, arXiv 1412.6980) with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

use rayon::prelude::*;

use super::kernels::vectorised;

const BETAS: (f32, f32) = (0.9, 0.98);
const EPSILON: f32 = 1e-8;
/// Numbers that one thread updates at a time.
const PIECE: usize = 1 << 14;

/// First and second moments of one vector of parameters.
#[derive(Debug, Clone)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Moments {
    pub fn new(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }

    /// Moves `parameters` against `grad` and leaves `grad` at zero. `step` counts from 1; `decay` applies to every
    /// parameter given.
    pub fn update(&mut self, parameters: &mut [f32], grad: &mut [f32], step: u64, learning_rate: f32, decay: f32) {
        let power = |beta: f32| f64::from(beta).powf(step as f64);
        let rate = f64::from(learning_rate) / (1.0 - power(BETAS.0));
        let spread = 1.0 / (1.0 - power(BETAS.1));
        let factors = [rate as f32, spread as f32, 1.0 - learning_rate * decay];
        parameters
            .par_chunks_mut(PIECE)
            .zip(grad.par_chunks_mut(PIECE))
            .zip(self.first.par_chunks_mut(PIECE))
            .zip(self.second.par_chunks_mut(PIECE))
            .for_each(|(((parameters, grad), first), second)| apply(parameters, grad, first, second, factors));
    }
}

vectorised! {
    fn apply(parameters: &mut [f32], grad: &mut [f32], first: &mut [f32], second: &mut [f32], factors: [f32; 3]) {
        let [rate, spread, keep] = factors;
        for (((p, g), m), v) in parameters.iter_mut().zip(grad).zip(first).zip(second) {
            *m = BETAS.0 * *m + (1.0 - BETAS.0) * *g;
            *v = BETAS.1 * *v + (1.0 - BETAS.1) * *g * *g;
            *p = *p * keep - rate * *m / ((*v * spread).sqrt() + EPSILON);
            *g = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_steps_agree_with_the_definition_in_double_precision() {
        let grads = [[0.5f32, -2.0, 0.0], [0.25, 1.0, 1e-3], [-1.0, 0.0, 4.0]];
        let (rate, decay) = (0.01f32, 0.1f32);
        let mut parameters = vec![1.0f32, -1.0, 0.5];
        let mut moments = Moments::new(3);
        for (step, grad) in (1..).zip(grads) {
            let mut grad = grad.to_vec();
            moments.update(&mut parameters, &mut grad, step, rate, decay);
            assert_eq!(grad, [0.0; 3]);
        }
        for i in 0..3 {
            let (mut m, mut v, mut p) = (0.0f64, 0.0f64, [1.0f64, -1.0, 0.5][i]);
            for (step, grad) in (1..).zip(grads) {
                let g = f64::from(grad[i]);
                m = 0.9 * m + 0.1 * g;
                v = 0.98 * v + 0.02 * g * g;
                let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(step)), v / (1.0 - 0.98f64.powi(step)));
                p = p * (1.0 - f64::from(rate) * f64::from(decay)) - f64::from(rate) * m_hat / (v_hat.sqrt() + 1e-8);
            }
            assert!((f64::from(parameters[i]) - p).abs() < 1e-6, "{} and {p}", parameters[i]);
        }
    }
}
