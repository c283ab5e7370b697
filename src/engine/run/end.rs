//! What follows from the end of an attempt: a result, a failure, another try elsewhere, and what was learnt.

use std::time::Duration;

use grlm_stages::{Failure, event::LogLevel};

use super::{Done, Engine, State, Tried};
use crate::{
    engine::{
        attempt::{AttemptError, End},
        decide::Action,
        measured::Measured,
        work::NodeId,
    },
    events::Body,
    executor::AttemptFailure,
    schedule::TaskId,
};

impl Engine<'_> {
    pub(super) fn ended(&mut self, id: NodeId, end: Result<End, AttemptError>, tried: Tried) {
        self.running -= 1;
        let State::Running(action) = std::mem::replace(&mut self.states[id], State::Waiting) else { return };
        let key = action.key;
        self.tried.insert(id, tried);
        if let Err(error) = self.dispatcher.finish(TaskId(id)) {
            self.give_up(error.into());
        }
        match end {
            Ok(End::Published { record, duration }) => {
                let seconds = duration.as_secs_f64();
                let (peak_memory, peak_gpu_memory) = (record.peak_memory, record.peak_gpu_memory);
                let pipeline = self.work.pipelines[self.work.nodes[id].places[0].pipeline].name.clone();
                let input_bytes = action.inputs.values().map(|content| content.size).sum();
                self.learn(id, |measured| {
                    (measured.seconds, measured.memory) = (seconds, peak_memory);
                    (measured.pipeline, measured.input_bytes) = (Some(pipeline), Some(input_bytes));
                    measured.gpu_memory = peak_gpu_memory.or(measured.gpu_memory);
                    measured.out_of_memory = tried.out_of_memory;
                });
                self.emit(Some(id), None, Body::Finished { seconds, peak_memory, peak_gpu_memory });
                self.done(id, Done { key, outputs: record.outputs });
            }
            Ok(End::Reused(outputs)) => {
                self.emit(Some(id), None, Body::Cached { saved: None, key: Some(key) });
                self.done(id, Done { key, outputs });
            }
            Ok(End::Failed { failure, duration }) => {
                if failure.failure == Failure::Stopped {
                    self.skip(id, "the run was stopped".into());
                } else {
                    self.fail_after(id, failure, duration);
                }
            }
            Ok(End::Again { failure, duration, lost }) => return self.again(id, action, failure, duration, &lost),
            Err(error) => {
                self.fail(id, error.as_failure());
                if let AttemptError::Store(error) = error {
                    self.give_up(error.into());
                }
            }
        }
        self.release_twins(key);
        self.settle();
    }

    /// An attempt failed for want of a device or of memory on it: it waits again, without what is gone, for more.
    fn again(&mut self, id: NodeId, action: Box<Action>, failure: AttemptFailure, duration: Duration, lost: &[String]) {
        let had = self.leases.remove(&id).and_then(|lease| lease.gpu_memory);
        if failure.failure == Failure::OutOfMemory
            && let Some(share) = had
        {
            self.learn(id, |measured| measured.gpu_too_small = measured.gpu_too_small.max(Some(share)));
        }
        self.emit(Some(id), None, Body::failed(failure, duration, Some(Duration::ZERO)));
        for uuid in lost {
            let message = format!("{uuid} is gone, so nothing more runs on it");
            self.emit(Some(id), None, Body::Log { level: LogLevel::Warn, message });
            for (TaskId(other), unfit) in self.dispatcher.lose(uuid) {
                if let State::Queued(action) = &self.states[other] {
                    let key = action.key;
                    self.unfit(other, &unfit, key);
                }
            }
        }
        self.queue(id, action);
        self.settle();
    }

    /// Adds to what is known of a stage, for the rest of this run and for later ones.
    pub(super) fn learn(&mut self, id: NodeId, lesson: impl FnOnce(&mut Measured)) {
        let (store, machine) = (&self.workshop.store, self.dispatcher.machine());
        let stage = self.work.stage(id);
        let mut measured = Measured::of(store, stage, machine);
        lesson(&mut measured);
        if let Err(error) = measured.write(store, stage, machine) {
            tracing::warn!(%error, "what a stage needs is not remembered");
        }
        self.outlook().measured[id] = Some(measured);
    }
}
