//! A stop cuts off the requests that are under way: a server that hangs would hold it up until `timeout` is over.
//!
//! Sockets are closed, which wakes who waits for them, under TLS too. A name that is being looked up and a connection
//! that is being made are not: these have a time limit of their own, which is short.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};

use ureq::Agent;

use super::NAP;
use crate::StopFlag;

/// Closes the agent's connections, and lets it make no more, once `stop` is set. The watch ends with what is returned.
/// Where no thread can be started, a stop waits for the requests.
pub fn watch(agent: Agent, stop: StopFlag) -> Sender<()> {
    let (watched, end) = mpsc::channel();
    let look = move || {
        while end.recv_timeout(NAP) == Err(RecvTimeoutError::Timeout) {
            if stop.is_set() {
                return agent.shutdown();
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("stop".into()).stack_size(512 << 10).spawn(look) {
        tracing::warn!(%error, "a stop will wait for requests that are under way");
    }
    watched
}
