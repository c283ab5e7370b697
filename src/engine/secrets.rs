//! Keys of servers that a run will need: a stage that is to ask a server without one fails, after all stages before it.

use grlm_cache::Store;

use super::{
    foresee::{Foreseen, foresee},
    rows::{self, Untold},
    run::RunError,
    work::{NodeId, Permission, Work},
};

/// Looks for a variable that is not set and that a stage needs: one with rows that are missing, or of which nothing can
/// be said before another stage has run.
///
/// # Errors
/// There is one; its rows cannot be told (a file of the user's is damaged); the store cannot be read.
pub fn check(store: &Store, work: &Work) -> Result<(), RunError> {
    let unset = unset(work);
    if unset.is_empty() {
        return Ok(());
    }
    let plan = foresee(store, work)?;
    for (id, variable) in unset {
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
            let message = format!("`{}` asks a server with the key in `{variable}`, which is not set", node.label);
            let help = format!("export {variable}; where every answer is known already, any value will do");
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

/// Stages that may run, each with a variable of its that is not set.
fn unset(work: &Work) -> Vec<(NodeId, String)> {
    (0..work.nodes.len())
        .filter(|id| work.nodes[*id].permission != Permission::Leave)
        .flat_map(|id| {
            let stage = work.stage(id);
            let names = stage.kind.secrets(&stage.params).into_values();
            names.filter(|name| !is_set(name)).map(move |name| (id, name))
        })
        .collect()
}
