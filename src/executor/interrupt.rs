//! Asking attempts to stop: first politely, then at once. [`on_ctrl_c`] turns signals into such requests.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// What running attempts are asked to do. Only ever goes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Stop {
    /// Go on.
    #[default]
    No,
    /// Save and stop (SIGTERM), within the grace period.
    Save,
    /// Stop at once (SIGKILL).
    Now,
}

pub type StopReceiver = watch::Receiver<Stop>;

/// The asking side. One is enough for a whole run; attempts of a failed sweep can have their own.
#[derive(Debug, Clone)]
pub struct StopSender(watch::Sender<Stop>);

pub fn stop_channel() -> (StopSender, StopReceiver) {
    let (sender, receiver) = watch::channel(Stop::No);
    (StopSender(sender), receiver)
}

impl StopSender {
    /// Asks for at least this much.
    pub fn ask(&self, stop: Stop) {
        self.0.send_if_modified(|current| {
            let more = stop > *current;
            *current = (*current).max(stop);
            more
        });
    }

    /// One step further: go on → save and stop → at once. What a Ctrl-C does.
    pub fn escalate(&self) -> Stop {
        let next = match *self.0.borrow() {
            Stop::No => Stop::Save,
            Stop::Save | Stop::Now => Stop::Now,
        };
        self.ask(next);
        next
    }

    pub fn current(&self) -> Stop {
        *self.0.borrow()
    }
}

/// Escalates at every SIGINT, SIGTERM and SIGHUP, and reports each step; runs until cancelled. Poll it beside the
/// engine's own loop.
///
/// # Errors
/// If the handlers cannot be installed.
pub async fn on_ctrl_c(stop: StopSender, mut asked: impl FnMut(Stop)) -> std::io::Result<std::convert::Infallible> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        asked(stop.escalate());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_only_go_up() {
        let (sender, receiver) = stop_channel();
        assert_eq!(*receiver.borrow(), Stop::No);
        assert_eq!(sender.escalate(), Stop::Save);
        assert_eq!(sender.escalate(), Stop::Now);
        sender.ask(Stop::Save);
        assert_eq!(*receiver.borrow(), Stop::Now);
    }
}
