//! From typed blocks to stages: kinds looked up, parameters completed, ports connected, cycles found.

mod connect;
mod declared;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use grlm_stages::{Output, Ports, Resources, StageKind};
use petgraph::{algo::tarjan_scc, graph::DiGraph};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde_json::{Map, Value};

use super::{
    InputSource, Stage, StageName, check_name, hint,
    mistake::{KeyPath, Mark, Mistake, below, path},
    repair::{every_mistake, keys, typed},
    spec::{FileSpec, StageSpec},
};
use connect::connect;

/// The kind whose outputs a pipeline names and whose text names ports.
pub(super) const COMMAND: &str = "command";

/// A stage on its way: what could be made out of it so far.
struct Draft {
    name: String,
    at: KeyPath,
    spec: Option<StageSpec>,
    kind: Option<&'static dyn StageKind>,
    params: Value,
    /// `None` if the parameters or the kind are not known: nothing is said about its ports then.
    ports: Option<Ports>,
    outputs: Vec<Output>,
    resources: Resources,
    mistakes: Vec<Mistake>,
}

/// The pipeline's name and its stages. What is wrong is added to `mistakes`; with mistakes, the stages are those that
/// something can still be said about, and are not to be run.
pub(super) fn resolve(
    root: Map<String, Value>,
    poisoned: &HashSet<KeyPath>,
    mistakes: &mut Vec<Mistake>,
) -> Option<(Option<String>, Vec<Stage>)> {
    let a_list = root.get("stages").is_some_and(Value::is_array);
    let file = typed::<FileSpec>(&Value::Object(root), &[], poisoned, mistakes);
    if a_list && let Some(mistake) = mistakes.iter_mut().find(|m| m.path == ["stages"]) {
        mistake.help = Some("write each stage's name as a key, without `-`: `tid: { uses: tid }`".to_owned());
    }
    let file = file?;
    if let Some(name) = &file.name {
        check_name(name, "pipeline", &path(&["name"]), Mark::Value, mistakes);
    }
    if file.stages.is_empty() {
        mistakes.push(Mistake::key(&path(&["stages"]), "the pipeline has no stages"));
    }
    let stages: Vec<(String, Value)> = file.stages.into_iter().collect();
    let mut drafts: Vec<Draft> =
        stages.into_par_iter().map(|(name, value)| Draft::read(name, &value, poisoned)).collect();
    let by_name: FxHashMap<&str, usize> = drafts.iter().enumerate().map(|(i, d)| (d.name.as_str(), i)).collect();
    let connected: Vec<BTreeMap<String, InputSource>> =
        drafts.iter().map(|draft| connect(draft, &drafts, &by_name, mistakes)).collect();
    drop(by_name);
    find_cycles(&drafts, &connected, mistakes);
    for draft in &mut drafts {
        mistakes.append(&mut draft.mistakes);
    }
    let stages = drafts.into_iter().zip(connected).filter_map(|(draft, inputs)| draft.finish(inputs)).collect();
    Some((file.name, stages))
}

impl Draft {
    fn read(name: String, value: &Value, poisoned: &HashSet<KeyPath>) -> Self {
        let at = path(&["stages", &name]);
        let mut draft = Self {
            name,
            at,
            spec: None,
            kind: None,
            params: Value::Null,
            ports: None,
            outputs: Vec::new(),
            resources: Resources::default(),
            mistakes: Vec::new(),
        };
        draft.fill(value, poisoned);
        draft
    }

    fn fill(&mut self, value: &Value, poisoned: &HashSet<KeyPath>) {
        check_name(&self.name, "stage", &self.at, Mark::Key, &mut self.mistakes);
        let Some(spec) = typed::<StageSpec>(value, &self.at, poisoned, &mut self.mistakes) else { return };
        self.kind = grlm_stages::kind(&spec.uses);
        if let Some(kind) = self.kind {
            self.fill_kind(kind, &spec, poisoned);
        } else {
            let at = below(&self.at, &["uses"]);
            if !poisoned.contains(&at) {
                let names = grlm_stages::kinds().iter().map(|k| k.name());
                let help = hint::nearest(&spec.uses, names).map(|near| format!("did you mean `{near}`?"));
                self.mistakes.push(
                    Mistake::value(&at, format!("unknown kind `{}`", spec.uses))
                        .help(help.unwrap_or_else(|| "`grlm stages` lists the kinds".to_owned())),
                );
            }
        }
        self.check_environment(&spec);
        self.spec = Some(spec);
    }

    fn fill_kind(&mut self, kind: &'static dyn StageKind, spec: &StageSpec, poisoned: &HashSet<KeyPath>) {
        let at = below(&self.at, &["with"]);
        let params = kind
            .resolve_params(&spec.with)
            .ok()
            .or_else(|| every_mistake(&spec.with, &at, poisoned, &mut self.mistakes, |with| kind.resolve_params(with)));
        let Some(params) = params else { return };
        match (kind.ports(&params), kind.resources(&params)) {
            (Ok(ports), Ok(resources)) => {
                self.resources = resources;
                self.outputs = ports.outputs.clone();
                if ports.open_outputs {
                    self.declare_outputs(spec);
                } else if let Some(port) = spec.outputs.keys().next() {
                    self.mistakes.push(
                        Mistake::key(
                            &below(&self.at, &["outputs", port]),
                            format!("the outputs of `{}` are fixed", kind.name()),
                        )
                        .help(format!("`grlm stages {}` lists them", kind.name())),
                    );
                }
                self.override_resources(spec);
                self.ports = Some(ports);
            }
            (Err(issues), _) | (_, Err(issues)) => {
                for issue in issues {
                    self.mistakes
                        .push(Mistake::value(&below(&at, &keys(&issue.path)), issue.message).maybe_help(issue.help));
                }
            }
        }
        self.check_secrets(kind.secrets(&params), spec);
        let inputs: Vec<&str> = spec.inputs.keys().map(String::as_str).collect();
        let outputs: Vec<&str> = self.outputs.iter().map(|o| o.name.as_ref()).collect();
        let issues = kind.check_ports(&params, &inputs, &outputs);
        self.mistakes.extend(
            issues.into_iter().map(|i| Mistake::value(&below(&at, &keys(&i.path)), i.message).maybe_help(i.help)),
        );
        if kind.name() == COMMAND {
            self.check_run(&params, spec);
        } else if !spec.code.is_empty() {
            self.mistakes.push(
                Mistake::key(&below(&self.at, &["code"]), format!("`code` has no meaning for `{}`", kind.name()))
                    .help("only a `command` runs code of the pipeline's own"),
            );
        }
        self.params = params;
    }

    fn finish(self, inputs: BTreeMap<String, InputSource>) -> Option<Stage> {
        let spec = self.spec?;
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names.dedup();
            names
        };
        Some(Stage {
            name: StageName(self.name),
            kind: self.kind?,
            description: spec.description,
            params: self.params,
            inputs,
            outputs: self.outputs,
            resources: self.resources,
            timeout: spec.timeout.map(|t| t.0),
            retries: spec.retries,
            env: sorted(spec.env),
            pass_env: sorted(spec.pass_env),
            secrets: sorted(spec.secrets),
            code: spec.code.into_iter().map(PathBuf::from).collect(),
        })
    }
}

/// One mistake for each group of stages that wait for each other.
fn find_cycles(drafts: &[Draft], connected: &[BTreeMap<String, InputSource>], mistakes: &mut Vec<Mistake>) {
    let sources = |stage: usize| {
        connected[stage].iter().filter_map(|(port, source)| match source {
            InputSource::Stage { stage, .. } => Some((port, *stage)),
            InputSource::File(_) => None,
        })
    };
    let mut graph = DiGraph::<(), (), u32>::with_capacity(drafts.len(), drafts.len() * 2);
    let nodes: Vec<_> = drafts.iter().map(|_| graph.add_node(())).collect();
    for stage in 0..drafts.len() {
        for (_, upstream) in sources(stage) {
            graph.add_edge(nodes[upstream], nodes[stage], ());
        }
    }
    for group in tarjan_scc(&graph) {
        let members: HashSet<usize> = group.iter().map(|n| n.index()).collect();
        let Some(&start) = members.iter().min() else { continue };
        // Walk upstream inside the group until a stage comes back: that stretch is a cycle.
        let mut walk = vec![start];
        let back = loop {
            let here = walk[walk.len() - 1];
            let Some((_, next)) = sources(here).find(|(_, s)| members.contains(s)) else { break None };
            match walk.iter().position(|s| *s == next) {
                Some(at) => break Some(at),
                None => walk.push(next),
            }
        };
        let Some(from) = back else { continue };
        let mut cycle: Vec<usize> = walk.split_off(from);
        cycle.reverse();
        // Begin with the stage that stands first in the file.
        if let Some(first) = cycle.iter().enumerate().min_by_key(|(_, s)| **s).map(|(i, _)| i) {
            cycle.rotate_left(first);
        }
        let Some((&head, &last)) = cycle.first().zip(cycle.last()) else { continue };
        let mut names: Vec<&str> = cycle.iter().map(|s| drafts[*s].name.as_str()).collect();
        names.push(names[0]);
        let shown = if names.len() > 12 {
            format!("{} → … → {}", names[..6].join(" → "), names[names.len() - 5..].join(" → "))
        } else {
            names.join(" → ")
        };
        let port = sources(head).find(|(_, s)| *s == last).map(|(p, _)| p.as_str()).unwrap_or_default();
        mistakes.push(
            Mistake::value(&below(&drafts[head].at, &["inputs", port]), format!("stages wait for each other: {shown}"))
                .help("one of these inputs must come from elsewhere"),
        );
    }
}

fn check_port_name(name: &str, at: &[String], mistakes: &mut Vec<Mistake>) {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 100 || !name.chars().all(fine) {
        mistakes.push(
            Mistake::key(at, format!("`{name}` is not a port name")).help("letters, digits, `-` and `_`, at most 100"),
        );
    }
}
