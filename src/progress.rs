//! Reporters: what a person, or a program, sees of a run. They read the event stream and nothing else.

use std::{
    collections::HashMap,
    io::Write,
    time::{Duration, Instant},
};

use crate::events::{Body, Event, Outcome, human_bytes, human_duration};

/// Sees every event of a run, in order.
pub trait Reporter {
    fn event(&mut self, event: &Event);
}

/// Errors alone.
pub struct Quiet;

impl Reporter for Quiet {
    fn event(&mut self, event: &Event) {
        if let Body::Failed { retry_in: None, .. } = event.body {
            Plain::default().event(event);
        }
    }
}

/// One JSON object a line on stdout.
pub struct Json;

impl Reporter for Json {
    fn event(&mut self, event: &Event) {
        if let Ok(text) = serde_json::to_string(event) {
            let _ = writeln!(std::io::stdout(), "{text}");
        }
    }
}

/// A line a change on stderr; progress at most every two seconds a stage.
#[derive(Default)]
pub struct Plain {
    progress: HashMap<String, (Instant, Instant)>,
}

/// Between two lines of progress of one stage.
const EVERY: Duration = Duration::from_secs(2);

impl Reporter for Plain {
    fn event(&mut self, event: &Event) {
        let stage = event.stage.as_deref().unwrap_or_default();
        let line = match &event.body {
            Body::RunStarted { pipeline, variant, stages, .. } => {
                let variant = variant.as_ref().map(|v| format!("@{v}")).unwrap_or_default();
                format!("{pipeline}{variant}: {stages} stages, run {}", event.run.as_str())
            }
            Body::Started { .. } => {
                let now = Instant::now();
                self.progress.insert(stage.to_owned(), (now, now));
                match event.attempt {
                    Some(n) if n > 1 => format!("{stage}: attempt {n}"),
                    _ => format!("{stage}: started"),
                }
            }
            Body::Queued { reason, .. } => format!("{stage}: to run, {reason}"),
            Body::Progress { done, total, unit } => {
                let now = Instant::now();
                let (began, last) = self.progress.entry(stage.to_owned()).or_insert((now, now));
                if now.duration_since(*last) < EVERY {
                    return;
                }
                *last = now;
                let rate = *done as f64 / now.duration_since(*began).as_secs_f64().max(1e-3);
                let left = Duration::from_secs_f64((total.saturating_sub(*done) as f64 / rate.max(1e-9)).min(1e9));
                format!("{stage}: {done}/{total} {unit}s, {rate:.1}/s, {} left", human_duration(left))
            }
            Body::Log { message, .. } => format!("{stage}: {message}"),
            Body::Finished { seconds, peak_memory } => {
                let time = human_duration(Duration::from_secs_f64(*seconds));
                format!("{stage}: done in {time}, {}", human_bytes(*peak_memory))
            }
            Body::Failed { message, help, tail, retry_in, .. } => {
                let mut text = format!("{stage}: failed: {message}");
                for line in tail {
                    text.push_str(&format!("\n    | {line}"));
                }
                if let Some(help) = help {
                    text.push_str(&format!("\n  help: {help}"));
                }
                if let Some(seconds) = retry_in {
                    text.push_str(&format!("\n  trying again in {seconds} s"));
                }
                text
            }
            Body::Skipped { because } => format!("{stage}: skipped, {because}"),
            Body::Stopping { at_once: false } => "stopping: stages save and end; once more to stop at once".into(),
            Body::Stopping { at_once: true } => "stopping at once".into(),
            Body::RunFinished { outcome, counts, seconds } => {
                let word = match outcome {
                    Outcome::Succeeded => "done",
                    Outcome::Failed => "failed",
                    Outcome::Interrupted => "interrupted",
                };
                let mut parts = vec![format!("{} ran", counts.ran), format!("{} cached", counts.cached)];
                if counts.failed > 0 {
                    parts.push(format!("{} failed", counts.failed));
                }
                if counts.skipped > 0 {
                    parts.push(format!("{} skipped", counts.skipped));
                }
                let time = human_duration(Duration::from_secs_f64(*seconds));
                format!("{word} in {time}: {}", parts.join(", "))
            }
            Body::Metric { .. } | Body::Cached { .. } => return,
        };
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
