//! Training inside a stage: progress, checkpoints, stopping and going on, and the second model of `refit`.

use std::time::{Duration, Instant};

use grlm_nn::sasrec::{Advance, EpochReport, Model, SasrecError, Schedule, Session, Trainer, steps_per_epoch};

use super::{failed, params::Params};
use crate::{StageContext, StageError, artifact::Split, leave_one_out::Dataset};

/// Time between two progress events, and between two checkpoints at the ends of epochs.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// What training came to.
pub struct Fitted {
    /// The best model on validation, which has seen no held-out item.
    pub validated: Model,
    /// The model trained on the validation items too, where that was asked for.
    pub refitted: Option<Model>,
    pub best_epoch: u64,
    pub steps: u64,
    pub epochs: Vec<EpochReport>,
}

/// Trains what `params` ask for, going on from the checkpoints of earlier attempts.
pub fn fit(
    params: &Params,
    dataset: &Dataset,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<Fitted, StageError> {
    let valid = dataset.users.iter().map(|u| u.query(Split::Valid)).collect();
    let schedule = Schedule {
        max_epochs: params.epochs,
        evaluate_every: params.evaluate_every,
        patience: params.patience,
        exclude_seen: params.exclude_seen,
    };
    let session = begin(params, dataset, &dataset.training)?;
    let session = train(Session::new(session, schedule, valid), "checkpoint.safetensors", pool, cx)?;
    let best_epoch = session.best_epoch();
    cx.info(format!("the model of epoch {best_epoch} is the best on validation"));
    let (steps, epochs) = (best_epoch * session.steps_per_epoch() as u64, session.reports().to_vec());

    let refitted = if params.refit {
        let trainer = begin(params, dataset, &dataset.training_and_valid())?;
        // Users of one training item have two now: an epoch may have a few steps more.
        let max_epochs = steps.div_ceil(trainer.steps_per_epoch() as u64);
        let schedule = Schedule { max_epochs, ..schedule };
        cx.info(format!("training again, on the validation items too, for {max_epochs} epochs"));
        Some(train(Session::new(trainer, schedule, Vec::new()), "refit.safetensors", pool, cx)?.into_model())
    } else {
        None
    };
    Ok(Fitted { validated: session.into_model(), refitted, best_epoch, steps, epochs })
}

fn begin(params: &Params, dataset: &Dataset, sequences: &[Vec<u32>]) -> Result<Trainer, StageError> {
    let model = Model::new(params.architecture(dataset.items.len()), params.seed).map_err(failed)?;
    let training = params.training(steps_per_epoch(&dataset.training, params.batch));
    Trainer::new(model, training, sequences).map_err(failed)
}

/// Runs a session to its end. What it came to stays in its checkpoint, so that a later phase that is stopped does not
/// cost this one.
fn train(
    mut session: Session,
    checkpoint: &str,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<Session, StageError> {
    let path = cx.scratch().join(checkpoint);
    if path.exists() {
        match session.resume(&path) {
            Ok(true) => cx.info(format!("going on after step {}", session.place().step)),
            Ok(false) => cx.warn("the checkpoint of an earlier attempt has other settings: starting anew"),
            Err(e @ SasrecError::Format { .. }) => cx.warn(format!("starting anew: {e}")),
            Err(e) => return Err(failed(e)),
        }
    }
    let total = session.max_epochs().saturating_mul(session.steps_per_epoch() as u64);
    let (mut shown, mut saved) = (Instant::now(), Instant::now());
    loop {
        if cx.stop_flag().is_set() {
            session.save(&path).map_err(failed)?;
            return Err(StageError::Stopped);
        }
        match pool.install(|| session.advance()).map_err(failed)? {
            Advance::Finished => {
                session.save(&path).map_err(failed)?;
                return Ok(session);
            }
            Advance::Step => {}
            Advance::Epoch(report) => {
                cx.metric("loss", report.mean_loss, Some(report.step));
                if let Some(valid) = report.valid {
                    cx.metric("valid.recall@10", valid.recall, Some(report.step));
                    cx.metric("valid.ndcg@10", valid.ndcg, Some(report.step));
                }
                if saved.elapsed() >= SAVE_EVERY {
                    session.save(&path).map_err(failed)?;
                    saved = Instant::now();
                }
            }
        }
        if shown.elapsed() >= PROGRESS_EVERY {
            cx.progress(session.place().step, total, "step");
            shown = Instant::now();
        }
    }
}
