//! Next-item training: batches of whole sequences, one optimiser step a batch, epochs in an order that seed and epoch
//! alone decide. Knows nothing of validation; `session` does.

use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    SasrecError,
    adam::Moments,
    config::{Loss, Training},
    kernels::{Dropout, add, move_towards},
    loss::{Batch, Negatives, Seen, Tiles, full_softmax, sampled_softmax},
    model::Model,
    network::{Activations, DropoutPlan, Piece},
    scoring,
};
use crate::train::schedule::{Decay, Schedule};

/// Rows that a piece of a batch has at least, unless it is the last.
const PIECE_ROWS: usize = 192;
/// The random stream that draws negatives; pieces of a batch have the small numbers.
const NEGATIVES_STREAM: u64 = (1 << 20) - 1;

/// How far training is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Steps done.
    pub step: u64,
    /// Epochs done.
    pub epoch: u64,
    /// Steps done in the present epoch.
    pub batch: usize,
    /// Sum of the losses of the present epoch's rows, and their number.
    pub loss: f64,
    pub rows: u64,
}

/// One step's outcome.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stepped {
    /// The epoch goes on.
    Within,
    /// The epoch ended with this mean loss a row.
    EpochEnd { mean_loss: f64 },
}

/// Steps of an epoch over `sequences`, of which those with fewer than two items do not count.
pub fn steps_per_epoch(sequences: &[Vec<u32>], batch: usize) -> usize {
    sequences.iter().filter(|s| s.len() > 1).count().div_ceil(batch.max(1))
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    pub(super) model: Model,
    /// The moving average of `model`, where one is kept.
    pub(super) average: Option<Model>,
    pub(super) settings: Training,
    pub(super) place: Place,
    pub(super) network_moments: Moments,
    pub(super) item_moments: Moments,
    sequences: Vec<Vec<u32>>,
    order: Vec<u32>,
    network_grad: Vec<f32>,
    items_grad: Vec<f32>,
    work: Vec<Work>,
    rows: Rows,
    tiles: Tiles,
    negatives: Negatives,
}

/// The rows of a batch, one a position that has a next item: its own item, the first row of its sequence, the target.
#[derive(Debug, Default)]
struct Rows {
    inputs: Vec<u32>,
    starts: Vec<u32>,
    targets: Vec<u32>,
}

/// What one piece of a batch needs; buffers live from batch to batch.
#[derive(Debug, Default)]
struct Work {
    piece: Piece,
    activations: Activations,
    grad: Vec<f32>,
    input_grad: Vec<f32>,
}

impl Trainer {
    /// `sequences` are training items, oldest first; of each the last `max_length + 1` are used, and those with
    /// fewer than two items not at all.
    ///
    /// # Errors
    /// `settings` break a limit, an item does not exist, or there is nothing to learn from.
    pub fn new(model: Model, settings: Training, sequences: &[Vec<u32>]) -> Result<Self, SasrecError> {
        settings.check()?;
        let items = model.architecture.items;
        if let Some(item) = sequences.iter().flatten().find(|item| **item as usize >= items) {
            return Err(SasrecError::Config(format!("item {item} does not exist: the model has {items}")));
        }
        let longest = model.architecture.max_length + 1;
        let sequences: Vec<Vec<u32>> =
            sequences.iter().filter(|s| s.len() > 1).map(|s| s[s.len().saturating_sub(longest)..].to_vec()).collect();
        if sequences.is_empty() {
            return Err(SasrecError::Config("no sequence has two training items".to_owned()));
        }
        let (network, embeddings) = (model.parameters.len(), model.items.len());
        let mut trainer = Self {
            average: (settings.averaging > 0.0).then(|| model.clone()),
            model,
            settings,
            place: Place::default(),
            network_moments: Moments::new(network),
            item_moments: Moments::new(embeddings),
            sequences,
            order: Vec::new(),
            network_grad: vec![0.0; network],
            items_grad: vec![0.0; embeddings],
            work: Vec::new(),
            rows: Rows::default(),
            tiles: Tiles::default(),
            negatives: Negatives::default(),
        };
        trainer.shuffle();
        Ok(trainer)
    }

    /// The model that training has come to: the moving average, where one is kept.
    pub fn model(&self) -> &Model {
        self.average.as_ref().unwrap_or(&self.model)
    }

    pub(super) fn into_model(self) -> Model {
        self.average.unwrap_or(self.model)
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn steps_per_epoch(&self) -> usize {
        self.sequences.len().div_ceil(self.settings.batch)
    }

    /// Goes back to where a checkpoint was taken; parameters and moments are the caller's to restore.
    pub(super) fn resume_at(&mut self, place: Place) {
        self.place = place;
        self.shuffle();
    }

    fn shuffle(&mut self) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.settings.seed);
        rng.set_stream(u64::MAX - self.place.epoch);
        self.order = (0..self.sequences.len() as u32).collect();
        self.order.shuffle(&mut rng);
    }

    /// Trains on one batch.
    ///
    /// # Errors
    /// The loss is not finite.
    pub fn step(&mut self) -> Result<Stepped, SasrecError> {
        self.load_batch();
        let loss = self.gradients();
        if !loss.is_finite() {
            return Err(SasrecError::NotFinite { step: self.place.step + 1 });
        }
        self.place.step += 1;
        let (step, rate, decay) = (self.place.step, self.learning_rate(), self.settings.weight_decay);
        // The network's norms and biases are too few for their decay to matter; its matrices decay with them.
        self.network_moments.update(&mut self.model.parameters, &mut self.network_grad, step, rate, decay);
        self.item_moments.update(&mut self.model.items, &mut self.items_grad, step, rate, decay);
        if let Some(average) = &mut self.average {
            // At first the average follows closely: random first values are not worth keeping.
            let share = (1.0 - self.settings.averaging).max(9.0 / (step + 9) as f32);
            move_towards(&mut average.parameters, share, &self.model.parameters);
            move_towards(&mut average.items, share, &self.model.items);
        }

        self.place.loss += loss;
        self.place.rows += self.rows.targets.len() as u64;
        self.place.batch += 1;
        if self.place.batch < self.steps_per_epoch() {
            return Ok(Stepped::Within);
        }
        let mean_loss = self.place.loss / self.place.rows as f64;
        self.place = Place { step: self.place.step, epoch: self.place.epoch + 1, ..Place::default() };
        self.shuffle();
        Ok(Stepped::EpochEnd { mean_loss })
    }

    /// The learning rate of the latest step.
    pub fn learning_rate(&self) -> f32 {
        let Training { learning_rate, warmup_steps, decay_steps, .. } = self.settings;
        let decay = if decay_steps.is_some() { Decay::Cosine } else { Decay::Constant };
        let total_steps = decay_steps.unwrap_or(0);
        let schedule = Schedule { peak: f64::from(learning_rate), decay, warmup_steps, total_steps, floor: 0.0 };
        schedule.at(self.place.step.saturating_sub(1)) as f32
    }

    /// Cuts the batch into pieces, and notes the input and target of all rows.
    fn load_batch(&mut self) {
        let start = self.place.batch * self.settings.batch;
        let users = &self.order[start..(start + self.settings.batch).min(self.order.len())];
        let Rows { inputs, starts, targets } = &mut self.rows;
        inputs.clear();
        starts.clear();
        targets.clear();
        let mut pieces = 0;
        for &user in users {
            let sequence = &self.sequences[user as usize];
            if pieces == 0 || self.work[pieces - 1].piece.rows() >= PIECE_ROWS {
                pieces += 1;
                if self.work.len() < pieces {
                    self.work.push(Work::default());
                }
                let piece = &mut self.work[pieces - 1].piece;
                piece.items.clear();
                piece.sequences.clear();
            }
            let before = &sequence[..sequence.len() - 1];
            self.work[pieces - 1].piece.push(before);
            starts.resize(starts.len() + before.len(), inputs.len() as u32);
            inputs.extend_from_slice(before);
            targets.extend_from_slice(&sequence[1..]);
        }
        self.work.truncate(pieces);
    }

    /// Adds the batch's gradients to `network_grad` and `items_grad`; returns the sum of the rows' losses.
    fn gradients(&mut self) -> f64 {
        let architecture = &self.model.architecture;
        let (width, scoring) = (architecture.hidden, architecture.scoring);
        let network = self.model.network();
        let Training { dropout, attention_dropout, seed, .. } = self.settings;
        let step = self.place.step;
        self.work.par_iter_mut().enumerate().for_each(|(number, work)| {
            let mut source = Dropout::new(seed, step, number as u64);
            let mut plan = DropoutPlan { source: &mut source, dropout, attention: attention_dropout };
            network.forward(&work.piece, &mut work.activations, Some(&mut plan));
        });

        let hidden: Vec<f32> = self.work.iter().flat_map(|w| &w.activations.hidden).copied().collect();
        let queries = scoring::query_vectors(scoring, &hidden, width);
        let vectors = scoring::item_vectors(scoring, &self.model.items, width);
        let Rows { inputs, starts, targets } = &self.rows;
        let seen = self.settings.exclude_seen.then_some(Seen { inputs, starts });
        let batch = Batch { hidden: &queries.vectors, targets, width, seen };
        let mut hidden_grad = vec![0.0; hidden.len()];
        let loss = match self.settings.loss {
            Loss::Full => {
                full_softmax(&mut self.tiles, batch, &vectors.vectors, &mut hidden_grad, &mut self.items_grad)
            }
            Loss::Sampled { negatives, log_q } => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(step.wrapping_mul(1 << 20).wrapping_add(NEGATIVES_STREAM));
                self.negatives.draw(negatives, architecture.items, log_q, &mut rng);
                sampled_softmax(batch, &vectors.vectors, &self.negatives, &mut hidden_grad, &mut self.items_grad)
            }
        };
        queries.backward(&mut hidden_grad, width);
        vectors.backward(&mut self.items_grad, width);

        let mut rest = hidden_grad.as_slice();
        let parts: Vec<&[f32]> = self
            .work
            .iter()
            .map(|work| {
                let (part, after) = rest.split_at(work.piece.rows() * width);
                rest = after;
                part
            })
            .collect();
        self.work.par_iter_mut().zip(parts).for_each(|(work, hidden_grad)| {
            work.grad.clear();
            work.grad.resize(network.layout.len(), 0.0);
            work.input_grad = network.backward(&work.piece, &work.activations, hidden_grad, &mut work.grad);
        });
        for work in &self.work {
            add(&mut self.network_grad, &work.grad);
            for (&item, grad) in work.piece.items.iter().zip(work.input_grad.chunks_exact(width)) {
                add(&mut self.items_grad[item as usize * width..][..width], grad);
            }
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{Activation, Architecture, Scoring};
    use super::*;

    fn settings(loss: Loss) -> Training {
        Training {
            loss,
            exclude_seen: false,
            batch: 4,
            learning_rate: 0.01,
            warmup_steps: 0,
            decay_steps: None,
            weight_decay: 0.0,
            dropout: 0.3,
            attention_dropout: 0.2,
            averaging: 0.0,
            seed: 11,
        }
    }

    fn architecture(scoring: Scoring, activation: Activation) -> Architecture {
        Architecture { items: 23, hidden: 8, layers: 2, heads: 2, feed_forward: 12, max_length: 6, activation, scoring }
    }

    /// Users with histories from 2 to 9 items: some longer than the model's window.
    fn sequences() -> Vec<Vec<u32>> {
        (0..10u32).map(|u| (0..2 + u % 8).map(|i| (u * 7 + i * 5) % 23).collect()).collect()
    }

    /// A trainer whose parameters are large enough that no gradient hides in rounding.
    fn trainer(loss: Loss, scoring: Scoring, activation: Activation) -> Trainer {
        let mut model = Model::new(architecture(scoring, activation), 5).unwrap();
        for x in model.parameters.iter_mut().chain(&mut model.items) {
            *x *= 12.0;
        }
        for tensor in model.layout.tensors().to_vec() {
            if tensor.name.ends_with("norm.weight") {
                model.parameters[tensor.place].iter_mut().enumerate().for_each(|(i, x)| *x = 1.0 + 0.05 * i as f32);
            }
        }
        Trainer::new(model, settings(loss), &sequences()).unwrap()
    }

    /// Mean loss of the present batch, its dropout and negatives held fixed by the step's number.
    fn loss_of(trainer: &mut Trainer) -> f64 {
        trainer.load_batch();
        let loss = trainer.gradients() / trainer.rows.targets.len() as f64;
        trainer.network_grad.fill(0.0);
        trainer.items_grad.fill(0.0);
        loss
    }

    #[test]
    fn gradients_agree_with_finite_differences_in_every_tensor() {
        let losses =
            [Loss::Full, Loss::Sampled { negatives: 9, log_q: false }, Loss::Sampled { negatives: 9, log_q: true }];
        for loss in losses {
            for (scoring, exclude_seen) in [(Scoring::Dot, true), (Scoring::Cosine { temperature: 0.3 }, false)] {
                let mut trainer = trainer(loss, scoring, Activation::Gelu);
                trainer.settings.exclude_seen = exclude_seen;
                trainer.load_batch();
                trainer.gradients();
                let network_grad =
                    std::mem::replace(&mut trainer.network_grad, vec![0.0; trainer.model.parameters.len()]);
                let items_grad = std::mem::replace(&mut trainer.items_grad, vec![0.0; trainer.model.items.len()]);

                let mut check = |name: &str, place: std::ops::Range<usize>, items: bool| {
                    let grad: Vec<f32> =
                        if items { items_grad[place.clone()].to_vec() } else { network_grad[place.clone()].to_vec() };
                    let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                    // The key's bias shifts all logits of a row alike; every other tensor must matter.
                    assert!(norm > 1e-4, "{name} receives no gradient under {loss:?} {scoring:?}");
                    // Along the gradient itself, the slope is its norm.
                    let mut at = |t: f64| {
                        let mut shift = |sign: f64| {
                            for (i, g) in place.clone().zip(&grad) {
                                let x =
                                    if items { &mut trainer.model.items[i] } else { &mut trainer.model.parameters[i] };
                                *x += (sign * t * f64::from(*g) / norm) as f32;
                            }
                        };
                        shift(1.0);
                        let loss = loss_of(&mut trainer);
                        let mut back = |i: usize, g: f32| {
                            let x = if items { &mut trainer.model.items[i] } else { &mut trainer.model.parameters[i] };
                            *x -= (t * f64::from(g) / norm) as f32;
                        };
                        place.clone().zip(&grad).for_each(|(i, g)| back(i, *g));
                        loss
                    };
                    let step = 4e-3;
                    let slope = (at(step) - at(-step)) / (2.0 * step);
                    assert!(
                        (slope - norm).abs() < 2e-4 + 0.01 * norm,
                        "{name} under {loss:?} {scoring:?}: slope {slope}, gradient {norm}"
                    );
                };
                for tensor in Model::new(architecture(scoring, Activation::Gelu), 5).unwrap().layout.tensors() {
                    check(&tensor.name, tensor.place.clone(), false);
                }
                for item in [0usize, 5, 12, 19] {
                    check(&format!("item {item}"), item * 8..(item + 1) * 8, true);
                }
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits_for_any_number_of_threads() {
        let run = |threads: usize, loss: Loss| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut trainer = trainer(loss, Scoring::Dot, Activation::Relu);
                for _ in 0..7 {
                    trainer.step().unwrap();
                }
                (trainer.model.parameters, trainer.model.items)
            })
        };
        for loss in [Loss::Full, Loss::Sampled { negatives: 9, log_q: false }] {
            assert_eq!(run(1, loss), run(3, loss));
        }
    }

    #[test]
    fn the_losses_equal_their_definition_in_double_precision() {
        for exclude_seen in [false, true] {
            let mut trainer = trainer(Loss::Full, Scoring::Dot, Activation::Gelu);
            trainer.settings.exclude_seen = exclude_seen;
            trainer.load_batch();
            let got = trainer.gradients();
            let hidden: Vec<f32> = trainer.work.iter().flat_map(|w| &w.activations.hidden).copied().collect();
            let Rows { inputs, starts, targets } = &trainer.rows;
            let items = &trainer.model.items;
            let logit = |row: usize, item: usize| {
                (0..8).map(|i| f64::from(hidden[row * 8 + i]) * f64::from(items[item * 8 + i])).sum::<f64>()
            };
            let mut expected = 0.0;
            for (row, &target) in targets.iter().enumerate() {
                let had = &inputs[starts[row] as usize..=row];
                let left_out = |item: u32| exclude_seen && item != target && had.contains(&item);
                let kept = (0..23u32).filter(|&item| !left_out(item));
                let sum: f64 = kept.map(|item| logit(row, item as usize).exp()).sum();
                expected += sum.ln() - logit(row, target as usize);
            }
            assert!((got - expected).abs() < 1e-4, "{got} and {expected}");

            // Every item as a negative: the sampled loss is then the full one.
            let negatives = Negatives { items: (0..23).collect(), log_expected: 0.0 };
            let seen = exclude_seen.then_some(Seen { inputs, starts });
            let batch = Batch { hidden: &hidden, targets, width: 8, seen };
            let (mut hidden_grad, mut items_grad) = (vec![0.0; hidden.len()], vec![0.0; items.len()]);
            let sampled = sampled_softmax(batch, items, &negatives, &mut hidden_grad, &mut items_grad);
            assert!((sampled - expected).abs() < 1e-4, "{sampled} and {expected}");
            let (mut full_hidden, mut full_items) = (hidden_grad.clone(), vec![0.0; items_grad.len()]);
            full_softmax(&mut Tiles::default(), batch, items, &mut full_hidden, &mut full_items);
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close(&full_hidden, &hidden_grad) && close(&full_items, &items_grad));
        }
    }

    #[test]
    fn the_rate_warms_up_and_falls_and_the_average_lags_behind() {
        let mut trainer = trainer(Loss::Full, Scoring::Dot, Activation::Gelu);
        trainer.settings = Training { warmup_steps: 2, decay_steps: Some(6), averaging: 0.5, ..trainer.settings };
        trainer.average = Some(trainer.model.clone());
        let mut rates = Vec::new();
        let mut mean = trainer.model.items.clone();
        for _ in 0..5 {
            trainer.step().unwrap();
            rates.push(trainer.learning_rate());
            // Until the tenth step the first values are let go faster than by a half.
            let share = 9.0 / (trainer.place.step + 9) as f32;
            mean.iter_mut().zip(&trainer.model.items).for_each(|(mean, x)| *mean += share.max(0.5) * (x - *mean));
        }
        assert_eq!(rates[..2], [0.005, 0.01]);
        assert!(rates[1..].is_sorted_by(|a, b| a >= b) && rates[4] > 0.0);
        assert!(trainer.model().items.iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-6));
        assert_ne!(trainer.model().items, trainer.model.items);
    }

    #[test]
    fn bad_sequences_are_refused() {
        let model = || Model::new(architecture(Scoring::Dot, Activation::Gelu), 5).unwrap();
        let error =
            |sequences: &[Vec<u32>]| Trainer::new(model(), settings(Loss::Full), sequences).unwrap_err().to_string();
        assert_eq!(error(&[vec![1, 99]]), "item 99 does not exist: the model has 23");
        assert_eq!(error(&[vec![1], vec![]]), "no sequence has two training items");
    }
}
