//! A whole training run: steps, validation after every few epochs, early stopping, the best model kept, and a
//! checkpoint from which it goes on to the same bits.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    SasrecError,
    config::{Architecture, Training},
    model::Model,
    ranking::{Metrics, Query},
    store::{self, Named},
    trainer::{Place, Stepped, Trainer},
};

/// When to look at validation, and when to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub max_epochs: u64,
    /// Epochs between two looks at validation.
    pub evaluate_every: u64,
    /// Looks without a better NDCG@10 after which training stops.
    pub patience: u64,
    /// Leave items of the history out of validation rankings.
    pub exclude_seen: bool,
}

/// What an epoch came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    pub step: u64,
    pub epoch: u64,
    pub mean_loss: f64,
    /// The learning rate of its last step.
    pub learning_rate: f32,
    /// At 10, on validation, if this epoch was followed by a look at it.
    pub valid: Option<Validation>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    pub recall: f64,
    pub ndcg: f64,
}

/// What [`Session::advance`] did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Advance {
    Step,
    Epoch(EpochReport),
    /// Nothing: training is over.
    Finished,
}

/// A run of training.
#[derive(Debug)]
pub struct Session {
    trainer: Trainer,
    schedule: Schedule,
    valid: Vec<Query>,
    progress: Progress,
    best: Option<Model>,
}

/// What a checkpoint keeps besides tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Progress {
    reports: Vec<EpochReport>,
    best_epoch: u64,
    best_ndcg: f64,
    waited: u64,
}

#[derive(Serialize, Deserialize)]
struct State {
    architecture: Architecture,
    training: Training,
    schedule: Schedule,
    place: Place,
    progress: Progress,
}

impl Session {
    /// Without validation queries, training runs for `max_epochs` and the last model is the result.
    pub fn new(trainer: Trainer, schedule: Schedule, valid: Vec<Query>) -> Self {
        Self { trainer, schedule, valid, progress: Progress::default(), best: None }
    }

    /// Does one step, and at the end of an epoch what is due then.
    ///
    /// # Errors
    /// The loss is not finite.
    pub fn advance(&mut self) -> Result<Advance, SasrecError> {
        if self.is_finished() {
            return Ok(Advance::Finished);
        }
        match self.trainer.step()? {
            Stepped::Within => Ok(Advance::Step),
            Stepped::EpochEnd { mean_loss } => Ok(Advance::Epoch(self.end_epoch(mean_loss))),
        }
    }

    fn is_finished(&self) -> bool {
        let place = self.trainer.place();
        place.epoch >= self.schedule.max_epochs || (place.batch == 0 && self.progress.waited >= self.schedule.patience)
    }

    fn end_epoch(&mut self, mean_loss: f64) -> EpochReport {
        let Place { step, epoch, .. } = self.trainer.place();
        let due = epoch.is_multiple_of(self.schedule.evaluate_every) || epoch == self.schedule.max_epochs;
        let valid = (due && !self.valid.is_empty()).then(|| {
            let placements = self.trainer.model().place(&self.valid, self.schedule.exclude_seen);
            let Metrics { recall, ndcg } = Metrics::at(10, &placements);
            Validation { recall, ndcg }
        });
        if let Some(Validation { ndcg, .. }) = valid {
            if self.best.is_none() || ndcg > self.progress.best_ndcg {
                self.best = Some(self.trainer.model().clone());
                (self.progress.best_epoch, self.progress.best_ndcg, self.progress.waited) = (epoch, ndcg, 0);
            } else {
                self.progress.waited += 1;
            }
        }
        let learning_rate = self.trainer.learning_rate();
        let report = EpochReport { step, epoch, mean_loss, learning_rate, valid };
        self.progress.reports.push(report);
        report
    }

    pub fn place(&self) -> Place {
        self.trainer.place()
    }

    pub fn steps_per_epoch(&self) -> usize {
        self.trainer.steps_per_epoch()
    }

    pub fn max_epochs(&self) -> u64 {
        self.schedule.max_epochs
    }

    pub fn reports(&self) -> &[EpochReport] {
        &self.progress.reports
    }

    /// The epoch whose model is the result so far.
    pub fn best_epoch(&self) -> u64 {
        if self.best.is_some() { self.progress.best_epoch } else { self.place().epoch }
    }

    /// The best model on validation, or the last one where there is no validation.
    pub fn into_model(self) -> Model {
        self.best.unwrap_or_else(|| self.trainer.into_model())
    }

    /// Writes all that is needed to go on, atomically.
    ///
    /// # Errors
    /// The disk is full, or the like; the previous checkpoint stays.
    pub fn save(&self, path: &Path) -> Result<(), SasrecError> {
        let state = State {
            architecture: self.trainer.model.architecture.clone(),
            training: self.trainer.settings.clone(),
            schedule: self.schedule,
            place: self.trainer.place,
            progress: self.progress.clone(),
        };
        let state = serde_json::to_string(&state).map_err(|e| store::format(path, e.to_string()))?;
        let trainer = &self.trainer;
        let mut tensors = vec![
            Named::flat("network", &trainer.model.parameters),
            Named::flat("network.first", &trainer.network_moments.first),
            Named::flat("network.second", &trainer.network_moments.second),
            Named::flat("items", &trainer.model.items),
            Named::flat("items.first", &trainer.item_moments.first),
            Named::flat("items.second", &trainer.item_moments.second),
        ];
        if let Some(average) = &trainer.average {
            tensors.push(Named::flat("average.network", &average.parameters));
            tensors.push(Named::flat("average.items", &average.items));
        }
        if let Some(best) = &self.best {
            tensors.push(Named::flat("best.network", &best.parameters));
            tensors.push(Named::flat("best.items", &best.items));
        }
        store::write_tensors(path, &tensors, Some(state))
    }

    /// Goes on from a checkpoint that a session of the same model, settings, schedule and data wrote; answers `false`
    /// and changes nothing if it was written under other settings.
    ///
    /// # Errors
    /// The file cannot be read, or is cut short.
    pub fn resume(&mut self, path: &Path) -> Result<bool, SasrecError> {
        let mut loaded = store::read_tensors(path)?;
        let state = loaded.state.take().ok_or_else(|| store::format(path, "it holds no training state"))?;
        let state: State = serde_json::from_str(&state).map_err(|e| store::format(path, e.to_string()))?;
        let trainer = &mut self.trainer;
        if state.architecture != trainer.model.architecture
            || state.training != trainer.settings
            || state.schedule != self.schedule
        {
            return Ok(false);
        }
        let (network, items) = ([trainer.model.parameters.len()], [trainer.model.items.len()]);
        let mut take = |name: &str, shape: &[usize]| loaded.take(path, name, shape);
        let parameters = take("network", &network)?;
        let embeddings = take("items", &items)?;
        let network_moments = (take("network.first", &network)?, take("network.second", &network)?);
        let item_moments = (take("items.first", &items)?, take("items.second", &items)?);
        let mut model = |name: &str, wanted: bool| -> Result<Option<Model>, SasrecError> {
            if !wanted {
                return Ok(None);
            }
            let parameters = take(&format!("{name}.network"), &network)?;
            let items = take(&format!("{name}.items"), &items)?;
            Ok(Some(Model { parameters, items, ..trainer.model.clone() }))
        };
        let average = model("average", trainer.average.is_some())?;
        let best = model("best", state.progress.best_epoch > 0)?;
        trainer.model.parameters = parameters;
        trainer.model.items = embeddings;
        trainer.average = average;
        (trainer.network_moments.first, trainer.network_moments.second) = network_moments;
        (trainer.item_moments.first, trainer.item_moments.second) = item_moments;
        trainer.resume_at(state.place);
        self.progress = state.progress;
        self.best = best;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{Activation, Loss, Scoring};
    use super::*;

    /// Every user walks round a circle of 30 items: the next item follows from the last one.
    fn circle() -> (Vec<Vec<u32>>, Vec<Query>) {
        let walk = |u: u32, n: u32| (0..n).map(|i| (u * 3 + i) % 30).collect::<Vec<u32>>();
        let train = (0..60).map(|u| walk(u, 4 + u % 5)).collect();
        let valid = (0..60).map(|u| Query { history: walk(u + 1, 5), target: (u * 3 + 8) % 30 }).collect();
        (train, valid)
    }

    fn session(loss: Loss, max_epochs: u64) -> Session {
        let architecture = Architecture {
            items: 30,
            hidden: 16,
            layers: 1,
            heads: 2,
            feed_forward: 32,
            max_length: 10,
            activation: Activation::Gelu,
            scoring: Scoring::Dot,
        };
        let training = Training {
            loss,
            exclude_seen: false,
            batch: 16,
            learning_rate: 0.01,
            warmup_steps: 4,
            decay_steps: None,
            weight_decay: 0.0,
            dropout: 0.1,
            attention_dropout: 0.1,
            averaging: 0.8,
            seed: 3,
        };
        let (train, valid) = circle();
        let trainer = Trainer::new(Model::new(architecture, 3).unwrap(), training, &train).unwrap();
        let schedule = Schedule { max_epochs, evaluate_every: 1, patience: 40, exclude_seen: false };
        Session::new(trainer, schedule, valid)
    }

    fn run(session: &mut Session) {
        while session.advance().unwrap() != Advance::Finished {}
    }

    #[test]
    fn both_losses_learn_a_circle() {
        for loss in [Loss::Full, Loss::Sampled { negatives: 12, log_q: false }] {
            let mut session = session(loss, 40);
            run(&mut session);
            let model = session.into_model();
            let metrics = Metrics::at(1, &model.place(&circle().1, false));
            assert!(metrics.recall > 0.9, "{loss:?}: {metrics:?}");
            let first = model.recommend(&[&[4, 5, 6]], 1, true);
            assert_eq!(first[0][0].item, 7);
        }
    }

    #[test]
    fn a_run_that_was_killed_ends_in_the_same_weights() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        let loss = Loss::Sampled { negatives: 12, log_q: true };
        let mut whole = session(loss, 6);
        run(&mut whole);

        // Killed five times, in the middle of an epoch each time.
        let mut last = session(loss, 6);
        for _ in 0..5 {
            for _ in 0..3 {
                last.advance().unwrap();
            }
            last.save(&path).unwrap();
            last = session(loss, 6);
            assert!(last.resume(&path).unwrap());
        }
        run(&mut last);
        assert_eq!(last.reports(), whole.reports());
        let (last, whole) = (last.into_model(), whole.into_model());
        assert_eq!(last.parameters, whole.parameters);
        assert_eq!(last.items, whole.items);
    }

    #[test]
    fn a_checkpoint_of_other_settings_or_cut_short_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        session(Loss::Full, 6).save(&path).unwrap();
        assert!(!session(Loss::Full, 7).resume(&path).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(matches!(session(Loss::Full, 6).resume(&path), Err(SasrecError::Format { .. })));
    }

    #[test]
    fn a_model_folder_is_read_back_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let model = session(Loss::Full, 1).into_model();
        model.save(folder.path()).unwrap();
        let loaded = Model::load(folder.path()).unwrap();
        assert_eq!(loaded.parameters, model.parameters);
        assert_eq!(loaded.items, model.items);
        assert_eq!(loaded.architecture, model.architecture);
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert!(matches!(Model::load(folder.path()), Err(SasrecError::Format { .. })));
    }
}
