//! What a run would do, without running anything.

use std::collections::HashMap;

use grlm_cache::Store;

use super::{
    decide::{self, Action, Answer, Files},
    history::History,
    run::{Done, RunError},
    work::{Permission, Source, Work, producers},
};

/// Walks the graph without running anything: what each node would do, and why.
///
/// # Errors
/// A file of the user's or the store cannot be read.
pub fn foresee(store: &Store, work: &Work) -> Result<Vec<Foreseen>, RunError> {
    let files = Files::digest(store, work)?;
    let histories: HashMap<usize, History> =
        (0..work.pipelines.len()).map(|p| (p, History::open(store.root(), &work.title(p)))).collect();
    let mut plan: Vec<Foreseen> = Vec::with_capacity(work.nodes.len());
    for (id, node) in work.nodes.iter().enumerate() {
        if node.permission == Permission::Leave {
            plan.push(Foreseen::Left);
            continue;
        }
        let unknown = producers(node).find(|&p| !matches!(plan[p], Foreseen::UpToDate(_)));
        if let Some(producer) = unknown {
            plan.push(Foreseen::Maybe { waits_for: work.nodes[producer].label.clone() });
            continue;
        }
        let inputs = node
            .sources
            .iter()
            .filter_map(|(port, source)| {
                let content = match source {
                    Source::File(path) => files.get(path).copied(),
                    Source::Output { node, port, .. } => match &plan[*node] {
                        Foreseen::UpToDate(done) => done.outputs.get(port).copied(),
                        _ => None,
                    },
                };
                Some((port.clone(), content?))
            })
            .collect();
        let action = Action::new(work.stage(id), inputs, &files);
        let answer = decide::look_up(store, &action.key)?;
        plan.push(match answer {
            Answer::Ready(record) if node.permission != Permission::Force => {
                Foreseen::UpToDate(Done { key: action.key, outputs: record.outputs })
            }
            Answer::Ready(_) => Foreseen::Run { reason: "forced".into(), action: Box::new(action) },
            answer => {
                let history = &histories[&node.places[0].pipeline];
                let reason = decide::reason(store, &answer, &action, history, work.stage(id).name.as_str());
                Foreseen::Run { reason, action: Box::new(action) }
            }
        });
    }
    Ok(plan)
}

/// What would happen to a node.
#[derive(Debug)]
pub enum Foreseen {
    UpToDate(Done),
    Run {
        reason: String,
        action: Box<Action>,
    },
    /// Decided when this stage has its result: an equal output stops the rerun there.
    Maybe {
        waits_for: String,
    },
    /// Not asked for.
    Left,
}
