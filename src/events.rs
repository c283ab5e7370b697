//! The one stream that tells what a run does: reporters show it, the journal keeps it. Workers contribute to it
//! through the engine, which adds time, run, stage and attempt.
//!
//! One event is one JSON object a line, `{"t", "run", "stage"?, "attempt"?, "kind", …}`. Readers must accept unknown
//! fields; a change that breaks them raises [`VERSION`], which the first event of a run carries.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grlm_cache::ActionKey;
use grlm_stages::{Failure, WorkerEvent, event::LogLevel};
use serde::{Deserialize, Serialize};

use crate::{executor::AttemptFailure, journal::RunId};

pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub t: f64,
    pub run: RunId,
    /// The stage's name; absent in events of the whole run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Counted from 1; absent outside attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    #[serde(flatten)]
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Body {
    /// The first event of a run.
    RunStarted {
        version: u32,
        pipeline: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        variant: Option<String>,
        /// Stages in the graph.
        stages: usize,
    },
    /// The stage's inputs are known and its result is not: it waits for devices.
    Queued {
        /// Why it has to run, in words.
        reason: String,
        /// Seconds it is expected to take, from earlier runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        estimate: Option<f64>,
    },
    /// An attempt begins.
    Started {
        cpus: usize,
        /// Names of the leased GPUs.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        devices: Vec<String>,
    },
    Progress {
        done: u64,
        total: u64,
        unit: String,
    },
    Metric {
        name: String,
        /// Not-a-number and infinities are written as null.
        value: Option<f64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
    },
    Log {
        level: LogLevel,
        message: String,
    },
    /// The result was in the store.
    Cached {
        /// Seconds it took when it was computed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        saved: Option<f64>,
        /// The action whose result it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<ActionKey>,
    },
    /// An attempt succeeded and its result is published.
    Finished {
        seconds: f64,
        /// Bytes.
        peak_memory: u64,
        /// Bytes held at most on one GPU, where that was seen.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peak_gpu_memory: Option<u64>,
    },
    /// An attempt failed.
    Failed {
        failure: Failure,
        message: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        help: Option<String>,
        /// The last lines of its log.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tail: Vec<String>,
        seconds: f64,
        /// Seconds until the next attempt; absent if there is none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_in: Option<f64>,
    },
    /// Will not run, because a stage before it failed or the run was stopped.
    Skipped {
        because: String,
    },
    /// Running stages were asked to stop; `at_once` the second time.
    Stopping {
        at_once: bool,
    },
    /// The last event of a run.
    RunFinished {
        outcome: Outcome,
        #[serde(flatten)]
        counts: Counts,
        seconds: f64,
    },
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Succeeded,
    Failed,
    Interrupted,
}

/// How many stages ended in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    pub ran: usize,
    pub cached: usize,
    pub failed: usize,
    pub skipped: usize,
}

impl Counts {
    pub fn done(self) -> usize {
        self.ran + self.cached + self.failed + self.skipped
    }

    /// Counts an event that ends a stage.
    pub fn count(&mut self, body: &Body) {
        match body {
            Body::Cached { .. } => self.cached += 1,
            Body::Finished { .. } => self.ran += 1,
            Body::Failed { retry_in: None, .. } => self.failed += 1,
            Body::Skipped { .. } => self.skipped += 1,
            _ => {}
        }
    }
}

impl Body {
    /// What a worker said while it ran. Its last word (finished, failed) is for the engine to tell.
    pub fn from_worker(event: WorkerEvent) -> Option<Self> {
        match event {
            WorkerEvent::Progress { done, total, unit } => Some(Self::Progress { done, total, unit }),
            WorkerEvent::Metric { name, value, step } => {
                Some(Self::Metric { name, value: value.is_finite().then_some(value), step })
            }
            WorkerEvent::Log { level, message } => Some(Self::Log { level, message }),
            WorkerEvent::Finished | WorkerEvent::Failed { .. } => None,
        }
    }

    pub fn failed(failure: AttemptFailure, duration: Duration, retry_in: Option<Duration>) -> Self {
        Self::Failed {
            failure: failure.failure,
            message: failure.message,
            help: failure.help,
            tail: failure.tail,
            seconds: duration.as_secs_f64(),
            retry_in: retry_in.map(|d| d.as_secs_f64()),
        }
    }
}

/// Seconds since 1970, to the microsecond.
pub fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1e6).round() / 1e6
}

/// `0.42 s`, `7.1 s`, `3 min 05 s`, `2 h 10 min`.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 0.0995 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// `512 B`, `1.5 KiB`, `80.0 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object_and_comes_back() {
        let event = Event {
            t: 12.5,
            run: RunId::parse("20260102T030405-abcd").unwrap(),
            stage: Some("train".into()),
            attempt: Some(2),
            body: Body::Progress { done: 3, total: 9, unit: "step".into() },
        };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(
            text,
            r#"{"t":12.5,"run":"20260102T030405-abcd","stage":"train","attempt":2,"kind":"progress","done":3,"total":9,"unit":"step"}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
        let body = Body::RunFinished {
            outcome: Outcome::Failed,
            counts: Counts { ran: 1, cached: 2, failed: 3, skipped: 4 },
            seconds: 1.0,
        };
        let text = serde_json::to_string(&Event { stage: None, attempt: None, body, ..event }).unwrap();
        assert!(text.ends_with(
            r#""kind":"run_finished","outcome":"failed","ran":1,"cached":2,"failed":3,"skipped":4,"seconds":1.0}"#
        ));
        assert_eq!(serde_json::to_string(&serde_json::from_str::<Event>(&text).unwrap()).unwrap(), text);
    }

    #[test]
    fn amounts_for_people() {
        let duration = |s: f64| human_duration(Duration::from_secs_f64(s));
        assert_eq!(
            [0.004, 0.42, 7.12, 9.99, 185.0, 7800.0].map(duration),
            ["4 ms", "0.4 s", "7.1 s", "10 s", "3 min 05 s", "2 h 10 min"]
        );
        assert_eq!([0, 1536, 80 << 30].map(human_bytes), ["0 B", "1.5 KiB", "80.0 GiB"]);
    }
}
