//! Lines on stderr, one a change: what a log or a pipe gets.

use std::{
    collections::HashMap,
    io::Write,
    time::{Duration, Instant},
};

use super::Reporter;
use crate::events::{Body, Event, Outcome, human_bytes, human_duration};

/// A line a change on stderr; progress at most every two seconds a stage.
#[derive(Default)]
pub struct Plain {
    progress: HashMap<String, (Pace, Instant)>,
}

/// How a stage gets on. What was done before its first word (rows that were known, steps of an earlier attempt) is no
/// speed of this attempt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    began: Instant,
    at_first: Option<u64>,
    last: u64,
}

impl Pace {
    /// Of a stage that starts now.
    pub fn new() -> Self {
        Self { began: Instant::now(), at_first: None, last: 0 }
    }

    /// `120/500 items, 40.0/s, 10 s left`. A `total` of 0 is not known.
    pub fn how_far(&mut self, done: u64, total: u64, unit: &str) -> String {
        if done < self.last {
            // Another part of the work, counted anew: a model that is trained a second time.
            *self = Self { at_first: Some(0), ..Self::new() };
        }
        self.last = done;
        let at_first = *self.at_first.get_or_insert(if done > 1 { done } else { 0 });
        how_far(done, total, unit, done.saturating_sub(at_first), self.began.elapsed())
    }
}

/// Between two lines of progress of one stage.
const EVERY: Duration = Duration::from_secs(2);

impl Reporter for Plain {
    fn event(&mut self, event: &Event) {
        let stage = event.stage.as_deref().unwrap_or_default();
        match &event.body {
            Body::Started { .. } => {
                self.progress.insert(stage.to_owned(), (Pace::new(), Instant::now()));
            }
            Body::Progress { done, total, unit } => {
                let now = Instant::now();
                let (pace, last) = self.progress.entry(stage.to_owned()).or_insert((Pace::new(), now));
                let text = pace.how_far(*done, *total, unit);
                if now.duration_since(*last) < EVERY {
                    return;
                }
                *last = now;
                let _ = writeln!(std::io::stderr(), "{stage}: {text}");
                return;
            }
            _ => {}
        }
        if let Some(line) = line(event) {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// How far a stage is that did `made` of it in `elapsed`.
fn how_far(done: u64, total: u64, unit: &str, made: u64, elapsed: Duration) -> String {
    let rate = made as f64 / elapsed.as_secs_f64().max(1e-3);
    let amount = |n: u64| if unit == "byte" { human_bytes(n) } else { n.to_string() };
    let speed = if unit == "byte" { format!("{}/s", human_bytes(rate as u64)) } else { format!("{rate:.1}/s") };
    let units = if unit == "byte" { String::new() } else { format!(" {unit}s") };
    if total == 0 || made == 0 {
        let of = if total == 0 { String::new() } else { format!("/{}", amount(total)) };
        return format!("{}{of}{units}, {speed}", amount(done));
    }
    let left = Duration::from_secs_f64((total.saturating_sub(done) as f64 / rate.max(1e-9)).min(1e9));
    format!("{}/{}{units}, {speed}, {} left", amount(done), amount(total), human_duration(left))
}

/// What an event says, where it says something by itself; progress does not.
pub(super) fn line(event: &Event) -> Option<String> {
    let stage = event.stage.as_deref().unwrap_or_default();
    Some(match &event.body {
        Body::RunStarted { pipeline, variant, stages, .. } => {
            let variant = variant.as_ref().map(|v| format!("@{v}")).unwrap_or_default();
            format!("{pipeline}{variant}: {stages} stages, run {}", event.run.as_str())
        }
        Body::Started { .. } => match event.attempt {
            Some(n) if n > 1 => format!("{stage}: attempt {n}"),
            _ => format!("{stage}: started"),
        },
        Body::Queued { reason, .. } => format!("{stage}: to run, {reason}"),
        Body::Log { message, .. } => format!("{stage}: {message}"),
        Body::Finished { seconds, peak_memory, .. } => {
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
        Body::Metric { .. } | Body::Cached { .. } | Body::Progress { .. } => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_gives_speed_and_time_left() {
        let after = |s| Duration::from_secs(s);
        assert_eq!(how_far(120, 520, "item", 120, after(3)), "120/520 items, 40.0/s, 10 s left");
        assert_eq!(how_far(0, 10, "step", 0, after(1)), "0/10 steps, 0.0/s");
        assert_eq!(how_far(3 << 20, 6 << 20, "byte", 3 << 20, after(3)), "3.0 MiB/6.0 MiB, 1.0 MiB/s, 3.0 s left");
        assert_eq!(how_far(7, 0, "row", 7, after(7)), "7 rows, 1.0/s");
        assert_eq!(how_far(2900, 3000, "row", 50, after(5)), "2900/3000 rows, 10.0/s, 10 s left", "2850 were known");
    }

    #[test]
    fn work_that_is_counted_anew_has_its_own_speed() {
        let long_ago = Instant::now().checked_sub(Duration::from_secs(1000)).unwrap();
        let mut pace = Pace { began: long_ago, at_first: Some(0), last: 3520 };
        let text = pace.how_far(10, 3520, "step");
        assert!(pace.began > long_ago && !text.contains(" 0.0/s"), "{text}");
    }
}
