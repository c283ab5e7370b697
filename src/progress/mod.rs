//! Reporters: what a person, or a program, sees of a run. They read the event stream and nothing else.
//!
//! | file | for |
//! |---|---|
//! | `plain` | logs and pipes: a line a change |
//! | `fancy` | terminals: running stages redrawn in place, lines above them |

mod fancy;
mod plain;

use std::io::Write;

pub use fancy::Fancy;
pub use plain::Plain;

use crate::events::{Body, Event};

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
