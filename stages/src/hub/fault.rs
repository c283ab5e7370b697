//! What can be wrong with the hub, or with who answers in its place, and what to do about each.

use std::time::Duration;

use crate::StageError;

/// Why one try failed.
pub enum Trouble {
    /// It may pass, after this long if the hub says so.
    Passing(Fault, String, Option<Duration>),
    /// Another try would end in the same way.
    Lasting(Fault, String),
    /// A mistake.
    Final(StageError),
}

impl Trouble {
    /// Nobody is to wait long for a description: a way that a firewall bars stays barred.
    pub fn lasting_if_barred(self) -> Self {
        match self {
            Self::Passing(fault @ Fault::Barred(_), what, _) => Self::Lasting(fault, what),
            other => other,
        }
    }

    pub fn passing(fault: Fault, message: String) -> Self {
        Self::Passing(fault, message, None)
    }
}

/// Whose fault it is that the hub had no answer of use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    NoConnection,
    /// No connection to this host, to which the hub sends us: mostly a firewall knows the hub alone.
    Barred(String),
    /// It answers 5xx, or too late; or so does a server to which it sends us.
    InTrouble,
    /// It was asked too often.
    Limited,
    /// A part of an answer came.
    BrokenOff,
    /// Who answers is no hub.
    NoHub,
}

impl Fault {
    /// What to do so that `repository` can be had.
    pub fn help(self, endpoint: &str, repository: &str) -> String {
        let instead = format!("put `{repository}` on this machine and give its folder");
        match self {
            Self::NoConnection => format!("without network, {instead}"),
            Self::Barred(host) => format!("let `{host}` through, or set HF_ENDPOINT to a mirror, or {instead}"),
            Self::InTrouble => {
                format!("the hub at {endpoint}, or where it sends us, is in trouble: try again later, or {instead}")
            }
            Self::Limited => format!(
                "the hub at {endpoint} limits how often it is asked: try again later, set HF_TOKEN (which is allowed \
                 more), or {instead}"
            ),
            Self::BrokenOff => {
                format!(
                    "the connection to {endpoint} breaks off: try again, which goes on from what came, or {instead}"
                )
            }
            Self::NoHub => format!(
                "is {endpoint} (HF_ENDPOINT, if it is set) a hub? a proxy or a login page may answer in its place; or \
                 {instead}"
            ),
        }
    }
}
