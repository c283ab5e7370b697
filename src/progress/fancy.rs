//! Running stages redrawn in place at the foot of a terminal, and what has happened in lines above them.

use std::{collections::HashMap, time::Duration};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    Reporter,
    plain::{Pace, line},
};
use crate::events::{Body, Counts, Event, human_duration};

/// Redrawn at most this often a second.
const FRAMES: u8 = 10;
const TICK: Duration = Duration::from_millis(200);

/// Live stages with their rows a second and the time left.
pub struct Fancy {
    multi: MultiProgress,
    /// The last line: how many stages are done.
    overall: ProgressBar,
    running: HashMap<String, Live>,
    /// Seconds that queued stages are expected to take.
    estimates: HashMap<String, f64>,
    counts: Counts,
    stages: usize,
}

/// A running stage.
struct Live {
    bar: ProgressBar,
    pace: Pace,
    /// The last figure that it told, such as `loss 2.31`.
    figure: String,
}

impl Fancy {
    pub fn new() -> Self {
        Self::on(ProgressDrawTarget::stderr_with_hz(FRAMES))
    }

    fn on(target: ProgressDrawTarget) -> Self {
        let multi = MultiProgress::with_draw_target(target);
        let overall = multi.add(ProgressBar::new_spinner().with_style(style("  {elapsed:>5} {msg}")));
        Self {
            multi,
            overall,
            running: HashMap::new(),
            estimates: HashMap::new(),
            counts: Counts::default(),
            stages: 0,
        }
    }

    fn start(&mut self, stage: &str) {
        let bar = ProgressBar::new(0).with_style(style("{spinner} {prefix} {msg}")).with_prefix(stage.to_owned());
        let bar = self.multi.insert_before(&self.overall, bar);
        bar.enable_steady_tick(TICK);
        if let Some(seconds) = self.estimates.get(stage) {
            bar.set_message(format!("took {} last time", human_duration(Duration::from_secs_f64(*seconds))));
        }
        let live = Live { bar, pace: Pace::new(), figure: String::new() };
        if let Some(earlier) = self.running.insert(stage.to_owned(), live) {
            earlier.bar.finish_and_clear();
        }
    }

    fn end(&mut self, stage: &str) {
        if let Some(live) = self.running.remove(stage) {
            live.bar.finish_and_clear();
            self.multi.remove(&live.bar);
        }
    }

    fn say(&self, text: &str) {
        let _ = self.multi.println(text);
    }

    fn standing(&self) -> String {
        let Counts { ran, cached, failed, .. } = self.counts;
        let mut text = format!("{} of {} stages: {ran} ran, {cached} cached", self.counts.done(), self.stages);
        if failed > 0 {
            text.push_str(&format!(", {failed} failed"));
        }
        if !self.running.is_empty() {
            text.push_str(&format!(", {} running", self.running.len()));
        }
        text
    }
}

impl Default for Fancy {
    fn default() -> Self {
        Self::new()
    }
}

/// A template that a test has seen; indicatif's own where it were wrong.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

impl Reporter for Fancy {
    fn event(&mut self, event: &Event) {
        let stage = event.stage.as_deref().unwrap_or_default();
        self.counts.count(&event.body);
        match &event.body {
            Body::RunStarted { stages, .. } => {
                self.stages = *stages;
                self.overall.enable_steady_tick(TICK);
            }
            // Why a stage runs is `grlm plan`'s to tell; here it would scroll the rest away.
            Body::Queued { estimate, .. } => {
                self.estimates.extend(estimate.map(|seconds| (stage.to_owned(), seconds)));
                return;
            }
            Body::Started { .. } => {
                self.start(stage);
                self.overall.set_message(self.standing());
                return;
            }
            Body::Progress { done, total, unit } => {
                if let Some(live) = self.running.get_mut(stage) {
                    live.bar.set_message(live.pace.how_far(*done, *total, unit) + &live.figure);
                }
                return;
            }
            Body::Metric { name, value: Some(value), .. } => {
                if let Some(live) = self.running.get_mut(stage) {
                    live.figure = format!(", {name} {value:.4}");
                }
                return;
            }
            Body::Finished { .. } | Body::Failed { .. } | Body::Skipped { .. } | Body::Cached { .. } => self.end(stage),
            Body::RunFinished { .. } => {
                let left: Vec<String> = self.running.keys().cloned().collect();
                left.iter().for_each(|stage| self.end(stage));
                self.overall.finish_and_clear();
                let _ = self.multi.clear();
            }
            _ => {}
        }
        if let Some(text) = line(event) {
            self.say(&text);
        }
        if !matches!(event.body, Body::RunFinished { .. }) {
            self.overall.set_message(self.standing());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{events::Outcome, journal::RunId};

    fn told(fancy: &mut Fancy, stage: Option<&str>, body: Body) {
        let run = RunId::parse("20260102T030405-abcd").unwrap();
        fancy.event(&Event { t: 0.0, run, stage: stage.map(str::to_owned), attempt: Some(1), body });
    }

    #[test]
    fn running_stages_come_and_go_and_are_counted() {
        let mut fancy = Fancy::on(ProgressDrawTarget::hidden());
        let started = Body::RunStarted { version: 1, pipeline: "p".into(), variant: None, stages: 3 };
        told(&mut fancy, None, started);
        told(&mut fancy, Some("a"), Body::Cached { saved: None, key: None });
        told(&mut fancy, Some("b"), Body::Queued { reason: "never ran".into(), estimate: Some(90.0) });
        told(&mut fancy, Some("b"), Body::Started { cpus: 1, devices: vec![] });
        assert_eq!(fancy.running["b"].bar.message(), "took 1 min 30 s last time");
        assert_eq!(fancy.standing(), "1 of 3 stages: 0 ran, 1 cached, 1 running");
        told(&mut fancy, Some("b"), Body::Metric { name: "loss".into(), value: Some(2.5), step: None });
        told(&mut fancy, Some("b"), Body::Progress { done: 3, total: 9, unit: "step".into() });
        told(&mut fancy, Some("b"), Body::Progress { done: 5, total: 9, unit: "step".into() });
        let message = fancy.running["b"].bar.message();
        assert!(message.starts_with("5/9 steps, ") && message.ends_with(" left, loss 2.5000"), "{message}");
        told(&mut fancy, Some("b"), Body::Finished { seconds: 1.0, peak_memory: 1, peak_gpu_memory: None });
        assert_eq!(fancy.standing(), "2 of 3 stages: 1 ran, 1 cached");
        told(&mut fancy, Some("c"), Body::Started { cpus: 1, devices: vec![] });
        let end = Body::RunFinished { outcome: Outcome::Interrupted, counts: fancy.counts, seconds: 1.0 };
        told(&mut fancy, None, end);
        assert!(fancy.running.is_empty() && fancy.overall.is_finished());
    }

    #[test]
    fn templates_are_right() {
        for template in ["  {elapsed:>5} {msg}", "{spinner} {prefix} {msg}"] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
