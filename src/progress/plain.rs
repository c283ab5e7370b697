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
    progress: HashMap<String, (Instant, Instant)>,
}

/// Between two lines of progress of one stage.
const EVERY: Duration = Duration::from_secs(2);

impl Reporter for Plain {
    fn event(&mut self, event: &Event) {
        let stage = event.stage.as_deref().unwrap_or_default();
        match &event.body {
            Body::Started { .. } => {
                let now = Instant::now();
                self.progress.insert(stage.to_owned(), (now, now));
            }
            Body::Progress { done, total, unit } => {
                let now = Instant::now();
                let (began, last) = self.progress.entry(stage.to_owned()).or_insert((now, now));
                if now.duration_since(*last) < EVERY {
                    return;
                }
                *last = now;
                let text = how_far(*done, *total, unit, now.duration_since(*began));
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

/// How far a stage is after `elapsed`: `120/500 items, 40.0/s, 10 s left`. A `total` of 0 is not known.
pub(super) fn how_far(done: u64, total: u64, unit: &str, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-3);
    let amount = |n: u64| if unit == "byte" { human_bytes(n) } else { n.to_string() };
    let speed = if unit == "byte" { format!("{}/s", human_bytes(rate as u64)) } else { format!("{rate:.1}/s") };
    let units = if unit == "byte" { String::new() } else { format!(" {unit}s") };
    if total == 0 || done == 0 {
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
        assert_eq!(how_far(120, 520, "item", after(3)), "120/520 items, 40.0/s, 10 s left");
        assert_eq!(how_far(0, 10, "step", after(1)), "0/10 steps, 0.0/s");
        assert_eq!(how_far(3 << 20, 6 << 20, "byte", after(3)), "3.0 MiB/6.0 MiB, 1.0 MiB/s, 3.0 s left");
        assert_eq!(how_far(7, 0, "row", after(7)), "7 rows, 1.0/s");
    }
}
