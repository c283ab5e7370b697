//! A training run: steps of packed passes, what was seen on the way, and a checkpoint from which it goes on to the
//! same bits.
//!
//! When to look at validation, and what at, is the caller's business; the session keeps what was found.

use std::{fs, path::Path};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    AdamW, AdamWOptions, Batch, DropoutRates, Model, Schedule,
    data::{Corpus, Place, Sample, pack, pass_seed},
    store::{self, Named, Reader, Stored},
};
use crate::{Error, generate::Trie};

/// Settings of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Samples of a pass.
    pub batch: usize,
    /// Passes of an optimiser step.
    pub accumulation: usize,
    /// Tokens of a pass at most: a pass with more is taken in parts, whose gradients add up to the same.
    pub pass_tokens: usize,
    pub optimizer: AdamWOptions,
    pub schedule: Schedule,
    /// Dropout of embeddings and residual branches.
    pub dropout: f32,
    /// Share of the past that an exponential moving average of what is trained keeps at each step, once it is ten times
    /// as long as that; the average is what is validated, kept, and results. 0 turns it off.
    pub averaging: f32,
    /// Brings every embedding to length 1 after each step. A tied head then scores tokens by cosine, times the length of
    /// the hidden state, which the final norm's weights learn.
    pub unit_embeddings: bool,
    pub seed: u64,
}

/// How far a run is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Samples taken, over all epochs.
    pub samples: u64,
    /// Learned tokens since the last point, and the sum of their losses.
    targets: u64,
    loss: f64,
    /// The steps at which points were taken.
    pub points: Vec<Point>,
    pub best: Option<Best>,
}

/// A point of the curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    pub epoch: f64,
    /// Mean over the learned tokens since the last point.
    pub loss: Option<f64>,
    pub learning_rate: f64,
    pub valid_loss: Option<f64>,
    pub metric: Option<f64>,
    pub tokens_per_s: Option<f64>,
}

/// The best model on validation so far; its numbers lie in a file of their own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    /// Higher is better: the metric, or the loss with its sign turned.
    pub value: f64,
}

/// What one optimiser step came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stepped {
    /// Its number, counted from 1.
    pub step: u64,
    /// Mean over its learned tokens.
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub norm: f64,
    pub learning_rate: f64,
    /// Tokens read, learned or not.
    pub tokens: usize,
}

/// A run of training.
pub struct Session {
    model: Model,
    optimizer: AdamW,
    gradients: Vec<f32>,
    /// The moving average, where there is one.
    average: Option<Vec<f32>>,
    corpus: Corpus,
    settings: Settings,
    order: Option<(u64, Vec<Place>)>,
    pub progress: Progress,
}

/// What must be equal for a checkpoint to be taken.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Fingerprint(String);

#[derive(Serialize, Deserialize)]
struct State {
    fingerprint: Fingerprint,
    optimizer_steps: u64,
    progress: Progress,
}

const STATE: &str = "state";

impl Session {
    pub fn new(mut model: Model, corpus: Corpus, settings: Settings) -> Self {
        if settings.unit_embeddings {
            model.normalize_embeddings();
        }
        let average = (settings.averaging > 0.0).then(|| model.trainable().to_vec());
        let optimizer = AdamW::new(model.trainable_tensors(), settings.optimizer);
        let gradients = vec![0.0; model.trainable().len()];
        Self { model, optimizer, gradients, average, corpus, settings, order: None, progress: Progress::default() }
    }

    pub fn model(&mut self) -> &mut Model {
        &mut self.model
    }

    pub fn into_model(self) -> Model {
        self.model
    }

    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    pub fn is_finished(&self) -> bool {
        self.progress.step >= self.settings.schedule.total_steps
    }

    /// Epochs done, with their fraction.
    pub fn epoch(&self) -> f64 {
        self.progress.samples as f64 / self.corpus.epoch_len().max(1) as f64
    }

    /// Takes one optimiser step.
    ///
    /// # Errors
    /// The loss or the gradient is not finite: an argument error that names the step. Nothing was changed.
    pub fn step(&mut self) -> Result<Stepped, Error> {
        let places = self.next_places();
        let s = &self.settings;
        let tokens_limit = s.pass_tokens;
        let passes: Vec<Batch> =
            places.chunks(s.batch).flat_map(|places| self.corpus.passes(places, s.batch, tokens_limit)).collect();
        let targets: usize = passes.iter().map(|b| b.targets.len()).sum();
        let scale = 1.0 / targets.max(1) as f32;
        let mut loss = 0.0;
        for (number, batch) in passes.iter().enumerate() {
            let seed = pass_seed(s.seed, self.progress.step, number as u64);
            let rates = DropoutRates { residual: s.dropout, seed };
            loss += self.model.loss_and_gradients(batch, scale, rates, &mut self.gradients);
        }
        let number = self.progress.step + 1;
        let learning_rate = s.schedule.at(self.progress.step);
        let norm = match loss.is_finite() {
            true => self.optimizer.step(self.model.trainable_mut(), &mut self.gradients, learning_rate),
            false => f64::NAN,
        };
        if !norm.is_finite() {
            self.gradients.fill(0.0);
            let what = if loss.is_finite() { "the gradient" } else { "the loss" };
            return Err(Error::argument(format!(
                "{what} is not finite at step {number} (learning rate {learning_rate:.1e})"
            ))
            .help("a lower learning rate or a longer warm-up helps most often; so does a lower `clip`"));
        }
        if s.unit_embeddings {
            self.model.normalize_embeddings();
        }
        self.progress.step = number;
        if let Some(average) = &mut self.average {
            // The share rises in the beginning, so that the first weights, which are random, are soon forgotten.
            let keep = self.settings.averaging.min((1.0 + number as f32) / (10.0 + number as f32));
            let pairs = average.par_chunks_mut(1 << 14).zip(self.model.trainable().par_chunks(1 << 14));
            pairs.for_each(|(average, now)| {
                average.iter_mut().zip(now).for_each(|(a, w)| *a += (1.0 - keep) * (w - *a))
            });
        }
        self.progress.samples += places.len() as u64;
        self.progress.targets += targets as u64;
        self.progress.loss += loss;
        let tokens = passes.iter().map(Batch::len).sum();
        Ok(Stepped { step: number, loss: loss / targets.max(1) as f64, norm, learning_rate, tokens })
    }

    /// The samples of the next step. A step may reach from one epoch into the next.
    fn next_places(&mut self) -> Vec<Place> {
        let per_epoch = self.corpus.epoch_len() as u64;
        let wanted = (self.settings.batch * self.settings.accumulation).min(per_epoch as usize);
        let mut places = Vec::with_capacity(wanted);
        let mut at = self.progress.samples;
        while places.len() < wanted {
            let (epoch, from) = (at / per_epoch, (at % per_epoch) as usize);
            if self.order.as_ref().is_none_or(|(e, _)| *e != epoch) {
                self.order = Some((epoch, self.corpus.order(self.settings.seed, epoch)));
            }
            let Some((_, order)) = &self.order else { break };
            let take = (wanted - places.len()).min(order.len() - from);
            places.extend(&order[from..from + take]);
            at += take as u64;
        }
        places
    }

    /// Calls `look` while the model has the averaged weights, where there are any.
    pub fn with_average<R>(&mut self, look: impl FnOnce(&mut Self) -> R) -> R {
        self.swap_average();
        let result = look(self);
        self.swap_average();
        result
    }

    /// Puts the averaged weights in the place of the last ones, and the other way round.
    fn swap_average(&mut self) {
        if let Some(average) = &mut self.average {
            self.model.trainable_mut().swap_with_slice(average);
        }
    }

    /// Ends the run with the averaged weights, where there are any.
    pub fn settle(&mut self) {
        if let Some(average) = self.average.take() {
            self.model.trainable_mut().copy_from_slice(&average);
        }
    }

    /// The mean loss of the learned tokens of these samples, without dropout.
    pub fn validate(&mut self, samples: &[Sample]) -> f64 {
        let (mut loss, mut targets) = (0.0, 0);
        for batch in pack(samples, usize::MAX, self.settings.pass_tokens) {
            loss += self.model.loss(&batch);
            targets += batch.targets.len();
        }
        loss / targets.max(1) as f64
    }

    /// Adds a point to the curve: the mean loss since the last one, and what validation said.
    pub fn mark(&mut self, valid_loss: Option<f64>, metric: Option<f64>, tokens_per_s: Option<f64>) -> Point {
        let p = &mut self.progress;
        let point = Point {
            step: p.step,
            epoch: p.samples as f64 / self.corpus.epoch_len().max(1) as f64,
            loss: (p.targets > 0).then(|| p.loss / p.targets as f64),
            learning_rate: self.settings.schedule.at(p.step.saturating_sub(1)),
            valid_loss,
            metric,
            tokens_per_s,
        };
        (p.loss, p.targets) = (0.0, 0);
        p.points.push(point.clone());
        point
    }

    /// Keeps the present model in `path` if `value` (higher is better) is the best so far.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn keep_if_best(&mut self, value: f64, path: &Path) -> Result<bool, Error> {
        if self.progress.best.is_some_and(|best| best.value >= value) || value.is_nan() {
            return Ok(false);
        }
        let values = self.model.trainable();
        store::write(path, &[Named::flat("trainable", values, &[values.len()])], &[], Stored::F32)?;
        self.progress.best = Some(Best { step: self.progress.step, value });
        Ok(true)
    }

    /// Takes the model that [`Session::keep_if_best`] kept.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn restore_best(&mut self, path: &Path) -> Result<(), Error> {
        Reader::open(path)?.read(path, "trainable", self.model.trainable_mut())?;
        Ok(())
    }

    fn fingerprint(&self) -> Fingerprint {
        let tokens: usize = self.corpus.samples().map(|s| s.tokens.len()).sum();
        let weights: Vec<f64> = self.corpus.sources.iter().map(|s| s.weight).collect();
        Fingerprint(format!(
            "{:?} {:?} {:?} {} trainable, {} samples, {tokens} tokens, weights {weights:?}",
            self.model.config(),
            self.settings,
            self.model.allowed().map(Trie::entries),
            self.gradients.len(),
            self.corpus.samples().count(),
        ))
    }

    /// Writes all that is needed to go on, atomically.
    ///
    /// # Errors
    /// The disk is full, or the like; the previous checkpoint stays.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let state = State {
            fingerprint: self.fingerprint(),
            optimizer_steps: self.optimizer.steps,
            progress: self.progress.clone(),
        };
        let state = serde_json::to_string(&state).map_err(|e| Error::model(path, e.to_string()))?;
        let shape = [self.gradients.len()];
        let mut arrays = vec![
            Named::flat("trainable", self.model.trainable(), &shape),
            Named::flat("first", &self.optimizer.first, &shape),
            Named::flat("second", &self.optimizer.second, &shape),
        ];
        arrays.extend(self.average.as_ref().map(|average| Named::flat("average", average, &shape)));
        store::write(path, &arrays, &[(STATE, &state)], Stored::F32)
    }

    /// Goes on from a checkpoint that a session of the same model, settings and data wrote; answers `false` and
    /// changes nothing if there is none, or it was written under other settings.
    ///
    /// # Errors
    /// The file cannot be read, or is cut short.
    pub fn resume(&mut self, path: &Path) -> Result<bool, Error> {
        if !fs::exists(path).map_err(|e| Error::io("read", path, e))? {
            return Ok(false);
        }
        let reader = Reader::open(path)?;
        let state = reader.metadata(STATE).ok_or_else(|| Error::model(path, "it holds no training state"))?;
        let state: State = serde_json::from_str(state).map_err(|e| Error::model(path, e.to_string()))?;
        if state.fingerprint != self.fingerprint() {
            return Ok(false);
        }
        reader.read(path, "first", &mut self.optimizer.first)?;
        reader.read(path, "second", &mut self.optimizer.second)?;
        reader.read(path, "trainable", self.model.trainable_mut())?;
        if let Some(average) = &mut self.average {
            reader.read(path, "average", average)?;
        }
        self.optimizer.steps = state.optimizer_steps;
        self.progress = state.progress;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Decay,
            data::Source,
            init,
            lora::{LoraOptions, Target},
        },
        *,
    };
    use crate::qwen3::Config;

    fn config() -> Config {
        Config {
            vocab_size: 40,
            hidden_size: 16,
            intermediate_size: 32,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            max_positions: 32,
            rope_theta: 1e4,
            rms_norm_eps: 1e-6,
            tied: true,
            bos_token: None,
            eos_tokens: Vec::new(),
            pad_token: None,
            initializer_range: 0.1,
        }
    }

    /// Each sample walks along a circle of 39 tokens from a start of its own: the next token follows from the last.
    fn corpus() -> Corpus {
        let walk = |start: u32| {
            let tokens = std::iter::once(0).chain((0..4 + start % 6).map(|i| 1 + (start * 5 + i) % 39)).collect();
            Sample { tokens, learned_from: 2 }
        };
        let first = Source { samples: (0..70).map(walk).collect(), weight: 1.0 };
        let second = Source { samples: (70..100).map(walk).collect(), weight: 0.5 };
        Corpus { sources: vec![first, second] }
    }

    fn session(total_steps: u64, peak: f64, lora: bool) -> Session {
        let settings = Settings {
            batch: 8,
            accumulation: 2,
            pass_tokens: 40,
            optimizer: AdamWOptions::default(),
            schedule: Schedule { peak, decay: Decay::Cosine, warmup_steps: 5, total_steps, floor: 0.0 },
            dropout: 0.1,
            averaging: 0.8,
            unit_embeddings: !lora,
            seed: 7,
        };
        let mut model = Model::new(config(), init::random(&config(), 1), 32);
        if lora {
            let targets = Target::ALL.to_vec();
            model.adapt(&LoraOptions { rank: 4, alpha: 8.0, dropout: 0.1, targets, seed: 2 });
        }
        Session::new(model, corpus(), settings)
    }

    fn run(session: &mut Session) {
        while !session.is_finished() {
            session.step().unwrap();
        }
    }

    #[test]
    fn the_next_token_is_learned() {
        let mut session = session(150, 0.02, false);
        let samples: Vec<Sample> = session.corpus().samples().cloned().collect();
        let before = session.validate(&samples);
        run(&mut session);
        let last = session.validate(&samples);
        session.settle();
        let after = session.validate(&samples);
        assert!(before > 3.0 && after < 0.2 && last < 0.2 && last != after, "{before} {after} {last}");
        let embedding = session.model.layout().embedding.clone();
        for row in session.model.weights[embedding].chunks_exact(16) {
            let length: f32 = row.iter().map(|x| x * x).sum();
            assert!((0.5..1.01).contains(&length), "an average of unit vectors: {length}");
        }
        let point = session.mark(Some(after), None, None);
        assert!(point.loss.unwrap() > after && point.step == 150 && (point.epoch - 150.0 * 16.0 / 85.0).abs() < 1e-9);
    }

    /// Killed five times, in the middle of an epoch each time; with adapters too.
    #[test]
    fn a_run_that_was_killed_ends_in_the_same_weights() {
        for lora in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (path, best) = (folder.path().join("c.safetensors"), folder.path().join("b.safetensors"));
            let samples: Vec<Sample> = corpus().samples().take(20).cloned().collect();
            let advance = |session: &mut Session, steps: u64| {
                for _ in 0..steps {
                    session.step().unwrap();
                    if session.progress.step.is_multiple_of(4) {
                        let loss = session.validate(&samples);
                        session.mark(Some(loss), None, None);
                        session.keep_if_best(-loss, &best).unwrap();
                    }
                }
            };
            let mut whole = session(18, 0.01, lora);
            advance(&mut whole, 18);

            let mut last = session(18, 0.01, lora);
            for _ in 0..5 {
                advance(&mut last, 3);
                last.save(&path).unwrap();
                last = session(18, 0.01, lora);
                assert!(last.resume(&path).unwrap());
            }
            advance(&mut last, 3);
            assert_eq!(last.progress, whole.progress);
            assert_eq!(last.model.trainable(), whole.model.trainable());
            assert_eq!(last.model.merged(), whole.model.merged());
            assert_eq!(last.average, whole.average);
            last.restore_best(&best).unwrap();
            assert!((last.validate(&samples) + last.progress.best.unwrap().value).abs() < 1e-12);
        }
    }

    #[test]
    fn a_checkpoint_of_other_settings_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        assert!(!session(9, 0.01, false).resume(&path).unwrap());
        session(9, 0.01, false).save(&path).unwrap();
        assert!(!session(10, 0.01, false).resume(&path).unwrap());
        assert!(!session(9, 0.01, true).resume(&path).unwrap());
        assert!(session(9, 0.01, false).resume(&path).unwrap());
    }

    #[test]
    fn numbers_that_are_not_finite_stop_the_run_with_the_step() {
        let mut session = session(100, 0.01, false);
        session.step().unwrap();
        session.model.weights[3] = f32::NAN;
        let error = session.step().unwrap_err();
        assert!(error.to_string().contains("not finite at step 2"), "{error}");
        assert!(matches!(error, Error::Argument { help: Some(help), .. } if help.contains("learning rate")));
    }
}
