//! The error that reaches the user: a report for the eye and an exit code for the caller.

use std::fmt;

use miette::{Diagnostic, Report};

use crate::exit_codes::Code;

/// An error at the edge. Everything below has error types of its own; verbs turn them into this.
#[derive(Debug)]
pub struct CliError {
    pub code: Code,
    pub report: Report,
}

impl CliError {
    /// Wraps any diagnostic.
    pub fn from_diagnostic(code: Code, diagnostic: impl Diagnostic + Send + Sync + 'static) -> Self {
        Self { code, report: Report::new(diagnostic) }
    }

    /// A lower-case fragment, and what to do next.
    pub fn message(code: Code, message: impl Into<String>, help: Option<String>) -> Self {
        Self::from_diagnostic(code, Plain { message: message.into(), help, source: None })
    }

    /// A lower-case fragment with the error that caused it, and what to do next.
    pub fn caused(
        code: Code,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
        help: Option<String>,
    ) -> Self {
        Self::from_diagnostic(code, Plain { message: message.into(), help, source: Some(Box::new(source)) })
    }
}

#[derive(Debug)]
struct Plain {
    message: String,
    help: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Plain {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl Diagnostic for Plain {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|h| Box::new(h) as _)
    }
}
