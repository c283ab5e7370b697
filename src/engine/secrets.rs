//! Keys of servers that a run will need: a stage that is to ask a server without one, or with one that cannot be sent,
//! fails, after all stages before it.

use grlm_cache::Store;

use super::{
    foresee::{Foreseen, foresee},
    rows::{self, Untold},
    run::RunError,
    work::{NodeId, Permission, Work},
};

/// Looks for a variable without a key that can be sent and that a stage needs: one with rows that are missing, or of
/// which nothing can be said before another stage has run.
///
/// # Errors
/// There is one; its rows cannot be told (a file of the user's is damaged); the store cannot be read.
pub fn check(store: &Store, work: &Work) -> Result<(), RunError> {
    let useless = useless(work);
    if useless.is_empty() {
        return Ok(());
    }
    let plan = foresee(store, work)?;
    for (id, variable, problem) in useless {
        let (node, stage) = (&work.nodes[id], work.stage(id));
        let needed = match &plan[id] {
            Foreseen::UpToDate(_) | Foreseen::Left => false,
            Foreseen::Maybe { .. } => true,
            Foreseen::Run { action, .. } => {
                let rows =
                    rows::foresee(store, stage, node, action, None).map_err(|error| untold(&node.label, error))?;
                rows.is_none_or(|rows| rows.missing > 0)
            }
        };
        if needed {
            let (message, help) = problem.told(&node.label, &variable);
            return Err(RunError::File { message, help: Some(help) });
        }
    }
    Ok(())
}

fn untold(label: &str, error: Untold) -> RunError {
    match error {
        Untold::Store(error) => error.into(),
        error => RunError::File { message: format!("`{label}`: {error}"), help: error.help() },
    }
}

/// Whether a variable has a value that can be a key.
pub fn is_set(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| !value.trim().is_empty())
}

/// Why a variable's value can be no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Problem {
    Unset,
    ControlCharacter,
}

impl Problem {
    /// White space around a key is left out where it is sent.
    fn of(value: Option<&str>) -> Option<Self> {
        match value.map(str::trim) {
            None | Some("") => Some(Self::Unset),
            Some(key) => key.contains(char::is_control).then_some(Self::ControlCharacter),
        }
    }

    /// Message and help, in which the value does not stand.
    fn told(self, label: &str, variable: &str) -> (String, String) {
        match self {
            Self::Unset => (
                format!("`{label}` asks a server with the key in `{variable}`, which is not set"),
                format!("export {variable}; where every answer is known already, any value will do"),
            ),
            Self::ControlCharacter => (
                format!(
                    "`{variable}` holds a line break or another control character: `{label}` cannot send it as its \
                     server's key"
                ),
                format!("export {variable} again, with the key alone"),
            ),
        }
    }
}

/// Stages that may run, each with a variable of its that holds no key.
fn useless(work: &Work) -> Vec<(NodeId, String, Problem)> {
    (0..work.nodes.len())
        .filter(|id| work.nodes[*id].permission != Permission::Leave)
        .flat_map(|id| {
            let stage = work.stage(id);
            let names = stage.kind.secrets(&stage.params).into_values();
            let of = |name: &str| Problem::of(std::env::var(name).ok().as_deref());
            names.filter_map(move |name| of(&name).map(|problem| (id, name, problem)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_one_line_of_text() {
        for none in [None, Some(""), Some(" \n")] {
            assert_eq!(Problem::of(none), Some(Problem::Unset), "{none:?}");
        }
        for key in ["sk-1", " sk-1\n", "sk-1\r\n", "schlüssel"] {
            assert_eq!(Problem::of(Some(key)), None, "{key:?}");
        }
        for key in ["sk-1\nsk-2", "sk-1\r\nx: y", "sk\t1", "sk-\u{7f}1", "sk-\u{1b}[0m"] {
            assert_eq!(Problem::of(Some(key)), Some(Problem::ControlCharacter), "{key:?}");
        }
    }
}
