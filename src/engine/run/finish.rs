//! The end of a run: what was left is told, and the journal closed, also when the store or the journal broke.

use super::{Ended, Engine, RunError, State};
use crate::{
    engine::work::Permission,
    events::{Body, Counts, Event, Outcome, now},
    executor::Stop,
    journal::{Journal, RunId},
};

/// Ends the journal of a run that could not begin; without that, it would look as if the program had died.
pub(super) fn close_unbegun(journal: &mut Journal, run: RunId) {
    let body = Body::RunFinished { outcome: Outcome::Failed, counts: Counts::default(), seconds: 0.0 };
    if let Err(error) = journal.append(&Event { t: now(), run, stage: None, attempt: None, body }) {
        tracing::warn!(%error, "the run's end is not recorded");
    }
}

impl Engine<'_> {
    pub(super) fn finish(mut self, titles: &[String]) -> Result<Ended, RunError> {
        for (history, title) in self.histories.iter_mut().zip(titles) {
            if let Err(error) = history.write(title) {
                tracing::warn!(%error, "what was run is not remembered for explanations");
            }
        }
        let broke = self.error.take();
        let outcome = match (&broke, *self.stop.1.borrow() != Stop::No) {
            (Some(_), _) => Outcome::Failed,
            (None, true) => Outcome::Interrupted,
            (None, false) if self.failed => Outcome::Failed,
            (None, false) => Outcome::Succeeded,
        };
        self.skip_what_is_left(outcome, broke.is_some());
        let (counts, seconds) = (self.counts, self.started.elapsed().as_secs_f64());
        self.emit(None, None, Body::RunFinished { outcome, counts, seconds });
        // The first error is what is told; that its run has an end in the journal is worth a try.
        if let Some(error) = broke.or(self.error) {
            return Err(error);
        }
        self.journal.flush()?;
        let results = self.states.into_iter().map(|s| if let State::Done(done) = s { Some(done) } else { None });
        Ok(Ended { outcome, counts, results: results.collect(), files: self.files })
    }

    fn skip_what_is_left(&mut self, outcome: Outcome, broke: bool) {
        let because = match outcome {
            _ if broke => "the run could not go on",
            Outcome::Interrupted => "the run was stopped",
            Outcome::Failed => "another stage failed",
            Outcome::Succeeded => "what it needs was not asked for",
        };
        for id in 0..self.states.len() {
            let undecided =
                matches!(self.states[id], State::Waiting | State::Queued(_) | State::Elsewhere(_) | State::Twin);
            if undecided && self.work.nodes[id].permission != Permission::Leave {
                self.emit(Some(id), None, Body::Skipped { because: because.into() });
            }
        }
    }
}
