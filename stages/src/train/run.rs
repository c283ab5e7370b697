//! The loop of a run in this program: steps, looks at validation, checkpoints, and when to stop.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use grlm_nn::train::{Schedule, Session, Settings};

use super::{params::Params, recall::Recall, validation::Validation};
use crate::{StageContext, StageError};

/// Time between two progress events.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How many steps there are, and when something is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub steps: u64,
    pub validate_every: u64,
}

impl Plan {
    /// For an epoch of so many samples.
    pub fn new(params: &Params, epoch: usize) -> Self {
        // A step takes no sample twice.
        let per_step = (params.batch * params.accumulation).min(epoch) as f64;
        let steps_of = |epochs: f64| ((epochs * epoch as f64 / per_step).ceil() as u64).max(1);
        let steps = params.steps.unwrap_or_else(|| steps_of(params.epochs));
        Self { steps, validate_every: params.validation.every.unwrap_or_else(|| steps_of(1.0)).min(steps) }
    }

    pub fn settings(self, params: &Params, out_of_memory: u32) -> Settings {
        Settings {
            batch: params.batch,
            accumulation: params.accumulation,
            pass_tokens: params.pass_tokens(out_of_memory),
            optimizer: params.optimizer(),
            schedule: Schedule {
                peak: params.learning_rate(),
                decay: params.decay(),
                warmup_steps: (params.warmup * self.steps as f64).round() as u64,
                total_steps: self.steps,
                floor: params.lr_floor,
            },
            dropout: params.dropout,
            averaging: params.averaging,
            unit_embeddings: params.unit_embeddings,
            seed: params.seed,
        }
    }
}

/// Files of an attempt that later attempts go on from.
pub struct Files {
    pub checkpoint: PathBuf,
    pub best: PathBuf,
}

impl Files {
    pub fn new(scratch: &Path) -> Self {
        Self { checkpoint: scratch.join("checkpoint.safetensors"), best: scratch.join("best.safetensors") }
    }
}

/// Goes on from an earlier attempt's checkpoint, if there is one and it can be used.
///
/// # Errors
/// It cannot be read.
pub fn resume(session: &mut Session, files: &Files, cx: &mut StageContext) -> Result<(), StageError> {
    match session.resume(&files.checkpoint) {
        Ok(true) => cx.info(format!("going on after step {}", session.progress.step)),
        Ok(false) if files.checkpoint.exists() => {
            cx.warn("the checkpoint of an earlier attempt has other settings: starting anew");
        }
        Ok(false) => {}
        Err(e @ grlm_nn::Error::Model { .. }) => cx.warn(format!("starting anew: {e}")),
        Err(e) => return Err(e.into()),
    }
    Ok(())
}

/// Trains to the end, and leaves the best model (or, without validation, the last one) in the session.
///
/// # Errors
/// The loss is not finite; the disk is full; a stop was asked for, after a checkpoint.
pub fn run(
    params: &Params,
    plan: Plan,
    session: &mut Session,
    validation: &Validation,
    recall: Option<&Recall>,
    files: &Files,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let pool = crate::threads::pool(cx)?;
    let mut shown = Instant::now();
    let (mut tokens, mut busy) = (0usize, Duration::ZERO);
    while !session.is_finished() && !out_of_patience(params, plan, session) {
        if cx.stop_flag().is_set() {
            session.save(&files.checkpoint)?;
            return Err(StageError::Stopped);
        }
        let started = Instant::now();
        let stepped = pool.install(|| session.step())?;
        busy += started.elapsed();
        tokens += stepped.tokens;
        if stepped.step.is_multiple_of(plan.validate_every) || session.is_finished() {
            let speed = tokens as f64 / busy.as_secs_f64().max(1e-9);
            (tokens, busy) = (0, Duration::ZERO);
            session.with_average(|session| look(session, validation, recall, speed, files, &pool, cx))?;
        }
        if stepped.step.is_multiple_of(params.save_every) && !session.is_finished() {
            session.save(&files.checkpoint)?;
        }
        if shown.elapsed() >= PROGRESS_EVERY {
            cx.progress(stepped.step, plan.steps, "step");
            shown = Instant::now();
        }
    }
    cx.progress(session.progress.step, plan.steps, "step");
    session.settle();
    if let Some(best) = session.progress.best {
        session.restore_best(&files.best)?;
        cx.info(format!("the model of step {} is the best on validation", best.step));
    }
    Ok(())
}

/// Looks at validation, adds a point to the curve, and keeps the model if it is the best so far.
fn look(
    session: &mut Session,
    validation: &Validation,
    recall: Option<&Recall>,
    speed: f64,
    files: &Files,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let valid_loss = (!validation.is_empty()).then(|| pool.install(|| session.validate(&validation.samples)));
    let metric = recall.map(|recall| recall.measure(session.model(), &validation.users, pool)).transpose()?;
    let point = session.mark(valid_loss, metric, Some(speed));
    for (name, value) in [("loss", point.loss), ("valid.loss", point.valid_loss), ("tokens_per_s", point.tokens_per_s)]
    {
        if let Some(value) = value {
            cx.metric(name, value, Some(point.step));
        }
    }
    if let Some(value) = point.metric.or(point.valid_loss.map(|loss| -loss)) {
        session.keep_if_best(value, &files.best)?;
    }
    Ok(())
}

fn out_of_patience(params: &Params, plan: Plan, session: &Session) -> bool {
    let Some((patience, best)) = params.validation.patience.zip(session.progress.best) else { return false };
    let since = session.progress.points.iter().filter(|p| p.step > best.step).count() as u64;
    // A run that is going on from a checkpoint between two looks has not yet looked again.
    session.progress.step.is_multiple_of(plan.validate_every) && since >= patience
}
