//! Gradients by finite differences, adapters, and what a batch must not change.

use super::{
    super::{kernels::Dropout, lora},
    *,
};

fn config(tied: bool) -> Config {
    Config {
        vocab_size: 23,
        hidden_size: 20,
        intermediate_size: 36,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        max_positions: 128,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tied,
        bos_token: None,
        eos_tokens: Vec::new(),
        pad_token: None,
        initializer_range: 0.02,
    }
}

/// Numbers between −1 and 1 from a fixed sequence.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let dropout = Dropout::new(0.5, u64::from(seed), 1).unwrap();
    (0..len as u32).map(|i| (0..12).map(|j| dropout.factor(i * 12 + j) - 1.0).sum::<f32>() / 6.0).collect()
}

fn model(tied: bool) -> Model {
    let config = config(tied);
    let layout = Layout::new(&config);
    let mut weights = noise(layout.len, 1);
    for tensor in &layout.tensors {
        let scale = if tensor.is_matrix() { 0.6 } else { 0.3 };
        let shift = if tensor.is_matrix() { 0.0 } else { 1.0 };
        weights[tensor.range.clone()].iter_mut().for_each(|w| *w = *w * scale + shift);
    }
    Model::new(config, weights, 128)
}

/// Segments of one token, of a few, and of more than one attention block.
fn batch() -> Batch {
    let mut batch = Batch::default();
    for (len, learned_from) in [(5, 0), (1, 0), (90, 3), (17, 9)] {
        let tokens: Vec<u32> = (0..len).map(|i| (i * i * 7 + len) % 23).collect();
        batch.push(&tokens, learned_from);
    }
    batch
}

fn check_gradients(tied: bool, rates: DropoutRates) {
    let (mut model, batch) = (model(tied), batch());
    let mut gradients = vec![0.0; model.weights.len()];
    model.loss_and_gradients(&batch, 1.0, rates, &mut gradients);
    let mut ignored = vec![0.0; gradients.len()];
    let weights = model.weights.clone();
    for tensor in model.layout.tensors.clone() {
        let own = &gradients[tensor.range.clone()];
        let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(length > 1e-3, "{} has no gradient", tensor.name);
        // Along the gradient, and in some other direction.
        let along: Vec<f32> = own.iter().map(|g| (f64::from(*g) / length) as f32).collect();
        let other = noise(own.len(), 5);
        for direction in [along, other] {
            let norm = direction.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>().sqrt();
            let step = 4e-3 / norm;
            let mut at = |sign: f64| {
                for (i, d) in tensor.range.clone().zip(&direction) {
                    model.weights[i] = (f64::from(weights[i]) + sign * step * f64::from(*d)) as f32;
                }
                let loss = model.loss_and_gradients(&batch, 1.0, rates, &mut ignored);
                model.weights.copy_from_slice(&weights);
                loss
            };
            let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
            let exact: f64 = own.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let error = (numeric - exact).abs() / (length * norm);
            assert!(error < 3e-3, "{}: {numeric} by differences, {exact} computed", tensor.name);
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    check_gradients(true, DropoutRates::default());
}

#[test]
fn gradients_agree_with_an_untied_head_and_dropout() {
    check_gradients(false, DropoutRates { residual: 0.25, seed: 3 });
}

/// As [`check_gradients`], for the adapters, with `B` away from zero.
#[test]
fn gradients_of_adapters_agree_with_finite_differences() {
    let (mut model, batch) = (model(false), batch());
    let targets = lora::Target::ALL.to_vec();
    model.adapt(&LoraOptions { rank: 3, alpha: 6.0, dropout: 0.2, targets, seed: 4 });
    let count = model.trainable().len();
    model.trainable_mut().iter_mut().zip(noise(count, 8)).for_each(|(v, n)| *v += 0.3 * n);
    let rates = DropoutRates { residual: 0.1, seed: 3 };
    let mut gradients = vec![0.0; count];
    model.loss_and_gradients(&batch, 1.0, rates, &mut gradients);
    let values = model.trainable().to_vec();
    let mut ignored = vec![0.0; count];
    for tensor in model.trainable_tensors().to_vec() {
        let own = &gradients[tensor.range.clone()];
        let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(length > 1e-3, "{} has no gradient", tensor.name);
        let step = 4e-3;
        let mut at = |sign: f64| {
            for (i, g) in tensor.range.clone().zip(own) {
                let moved = f64::from(values[i]) + sign * step * f64::from(*g) / length;
                model.trainable_mut()[i] = moved as f32;
            }
            let loss = model.loss_and_gradients(&batch, 1.0, rates, &mut ignored);
            model.trainable_mut().copy_from_slice(&values);
            loss
        };
        let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
        assert!((numeric - length).abs() < 3e-3 * length, "{}: {numeric} and {length}", tensor.name);
    }
}

#[test]
fn merged_adapters_compute_what_applied_ones_do() {
    let (mut adapted, batch) = (model(true), batch());
    let plain = adapted.logits(&batch);
    let targets = vec![lora::Target::Query, lora::Target::Value, lora::Target::Up];
    adapted.adapt(&LoraOptions { rank: 4, alpha: 8.0, dropout: 0.5, targets, seed: 4 });
    assert_eq!(adapted.logits(&batch), plain, "untrained adapters change nothing");
    let count = adapted.trainable().len();
    adapted.trainable_mut().iter_mut().zip(noise(count, 8)).for_each(|(v, n)| *v += 0.3 * n);
    let applied = adapted.logits(&batch);
    let mut merged = Model::new(adapted.config().clone(), adapted.merged().into_owned(), 128);
    let merged = merged.logits(&batch);
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart(&applied, &plain) > 0.1);
    assert!(apart(&applied, &merged) < 1e-4, "{}", apart(&applied, &merged));
}

#[test]
fn computing_again_gives_the_same_gradients_to_the_bit() {
    let run = |recompute: bool| {
        let mut model = model(true);
        model.recompute(recompute);
        let mut gradients = vec![0.0; model.weights.len()];
        let rates = DropoutRates { residual: 0.1, seed: 1 };
        let loss = model.loss_and_gradients(&batch(), 0.5, rates, &mut gradients);
        (loss.to_bits(), gradients.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn packing_changes_nothing() {
    let mut model = model(true);
    let all = batch();
    let mut one_by_one = 0.0;
    let mut places = 0;
    for (start, len) in all.segments.iter().scan(0, |at, len| {
        *at += len;
        Some((*at - len, *len))
    }) {
        let mut single = Batch::default();
        single.push(&all.tokens[start..start + len], 0);
        single.targets = all.targets.iter().filter(|t| (start..start + len).contains(&t.0)).copied().collect();
        single.targets.iter_mut().for_each(|t| t.0 -= start);
        places += single.targets.len();
        one_by_one += model.loss(&single);
    }
    assert_eq!(places, all.targets.len());
    let packed = model.loss(&all);
    assert!((packed - one_by_one).abs() < 1e-3 * packed, "{packed} {one_by_one}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut model = model(true);
        let mut gradients = vec![0.0; model.weights.len()];
        let rates = DropoutRates { residual: 0.1, seed: 1 };
        let loss = pool.install(|| model.loss_and_gradients(&batch(), 0.5, rates, &mut gradients));
        (loss.to_bits(), gradients.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(1), run(3));
}
