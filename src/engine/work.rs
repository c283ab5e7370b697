//! The work that a request names: the stages of one or several pipelines as one graph in which equal stages are one
//! node, and which of them may run.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use crate::{
    graph,
    pipeline::{InputSource, Pipeline, Stage},
};

/// A node of the graph: an index into [`Work::nodes`].
pub type NodeId = usize;

/// Which parts of the graph a request means.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// These stages and all that they need.
    pub until: Vec<String>,
    /// These stages and all that depends on them; what they need must be there.
    pub from: Vec<String>,
    /// These stages and no others; what they need must be there.
    pub only: Vec<String>,
    /// These run even if their results are there.
    pub force: Vec<String>,
}

impl Parts {
    /// Whether the whole graph is meant, nothing forced.
    pub fn is_everything(&self) -> bool {
        self.restrictions().is_empty() && self.force.is_empty()
    }

    /// The options that leave stages out.
    fn restrictions(&self) -> Vec<&'static str> {
        let all = [("`--until`", &self.until), ("`--from`", &self.from), ("`--only`", &self.only)];
        all.into_iter().filter(|(_, stages)| !stages.is_empty()).map(|(option, _)| option).collect()
    }
}

/// What may happen to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// Runs if its result is missing.
    Run,
    /// Runs even if its result is there.
    Force,
    /// Its result is needed, but it must not run.
    UseOnly,
    /// Nobody asked for it.
    Leave,
}

/// Where one input comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    /// An output of another node: its port, and the file name under which it is shown.
    Output {
        node: NodeId,
        port: String,
        file: String,
    },
}

/// A stage of a pipeline: indices into [`Work::pipelines`] and its stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pipeline: usize,
    pub stage: usize,
}

/// One stage to decide and perhaps to run; equal stages of several variants share one.
#[derive(Debug, Clone)]
pub struct Node {
    /// The stage's name; where a sweep has several stages of that name, with the variant behind it.
    pub label: String,
    /// Every place that shows its result; the first gives its definition.
    pub places: Vec<Place>,
    pub sources: BTreeMap<String, Source>,
    pub dependents: Vec<NodeId>,
    pub permission: Permission,
}

/// The graph of a request. Nodes stand in an order in which every one comes after what it needs.
#[derive(Debug)]
pub struct Work {
    pub pipelines: Vec<Pipeline>,
    pub nodes: Vec<Node>,
}

/// What is wrong with a choice of parts.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// No pipeline of the request has it.
    #[error("there is no stage `{name}`")]
    UnknownStage { name: String, known: Vec<String> },
    #[error("`--force {name}`: `{name}` is not among the stages that {} chose", options.join(" and "))]
    ForcedOutside {
        name: String,
        /// Those that chose.
        options: Vec<&'static str>,
    },
}

impl Work {
    /// Merges the pipelines and marks what `parts` means.
    ///
    /// # Errors
    /// `parts` names a stage that does not exist, or forces one that it does not mean.
    pub fn new(pipelines: Vec<Pipeline>, parts: &Parts) -> Result<Self, PartsError> {
        let merged = graph::merge(&pipelines);
        let mut nodes: Vec<Node> = Vec::with_capacity(merged.nodes.len());
        let mut node_of: Vec<Vec<NodeId>> = pipelines.iter().map(|p| vec![usize::MAX; p.stages.len()]).collect();
        for (id, merged_node) in merged.nodes.iter().enumerate() {
            let places: Vec<Place> =
                merged_node.occurrences.iter().map(|&(pipeline, stage)| Place { pipeline, stage }).collect();
            for place in &places {
                node_of[place.pipeline][place.stage] = id;
            }
            let Place { pipeline, stage } = places[0];
            let definition = &pipelines[pipeline].stages[stage];
            let sources = definition
                .inputs
                .iter()
                .map(|(port, source)| {
                    let source = match source {
                        InputSource::File(path) => Source::File(path.clone()),
                        InputSource::Stage { stage: producer, output } => {
                            let node = node_of[pipeline][*producer];
                            let output = &pipelines[pipeline].stages[*producer].outputs[*output];
                            Source::Output { node, port: output.name.to_string(), file: output.file.to_string() }
                        }
                    };
                    (port.clone(), source)
                })
                .collect();
            nodes.push(Node {
                label: definition.name.to_string(),
                places,
                sources,
                dependents: Vec::new(),
                permission: Permission::Run,
            });
        }
        for id in 0..nodes.len() {
            for producer in producers(&nodes[id]).collect::<BTreeSet<_>>() {
                nodes[producer].dependents.push(id);
            }
        }
        let mut work = Self { pipelines, nodes };
        work.label_apart();
        work.permit(parts)?;
        Ok(work)
    }

    /// The definition that a node stands for.
    pub fn stage(&self, node: NodeId) -> &Stage {
        self.stage_of(&self.nodes[node])
    }

    /// The same of a node in hand.
    pub fn stage_of(&self, node: &Node) -> &Stage {
        let Place { pipeline, stage } = node.places[0];
        &self.pipelines[pipeline].stages[stage]
    }

    /// How a pipeline of the request is called in `out/`: `name` or `name@variant`.
    pub fn title(&self, pipeline: usize) -> String {
        title(&self.pipelines[pipeline])
    }

    /// The nodes of this stage name, in any of the pipelines.
    fn named(&self, name: &str) -> Result<Vec<NodeId>, PartsError> {
        let found: Vec<NodeId> = (0..self.nodes.len()).filter(|&id| self.stage(id).name.to_string() == name).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let known: BTreeSet<String> = (0..self.nodes.len()).map(|id| self.stage(id).name.to_string()).collect();
        Err(PartsError::UnknownStage { name: name.to_owned(), known: known.into_iter().collect() })
    }

    /// Several nodes of one name are told apart by the first variant that has each.
    fn label_apart(&mut self) {
        let mut count: BTreeMap<String, usize> = BTreeMap::new();
        for node in &self.nodes {
            *count.entry(node.label.clone()).or_default() += 1;
        }
        for id in 0..self.nodes.len() {
            if count[&self.nodes[id].label] > 1
                && let Some(variant) = &self.pipelines[self.nodes[id].places[0].pipeline].variant
            {
                self.nodes[id].label = format!("{}@{variant}", self.nodes[id].label);
            }
        }
    }

    fn permit(&mut self, parts: &Parts) -> Result<(), PartsError> {
        let all = |names: &[String]| -> Result<Vec<NodeId>, PartsError> {
            names.iter().map(|n| self.named(n)).collect::<Result<Vec<_>, _>>().map(|v| v.concat())
        };
        let (until, from, only, force) = (all(&parts.until)?, all(&parts.from)?, all(&parts.only)?, all(&parts.force)?);
        if !parts.restrictions().is_empty() {
            let mut run: BTreeSet<NodeId> = only.into_iter().collect();
            run.extend(self.reach(until, |node| producers(node).collect()));
            run.extend(self.reach(from, |node| node.dependents.clone()));
            let needed = self.reach(run.iter().copied().collect(), |node| producers(node).collect());
            for (id, node) in self.nodes.iter_mut().enumerate() {
                node.permission = if run.contains(&id) {
                    Permission::Run
                } else if needed.contains(&id) {
                    Permission::UseOnly
                } else {
                    Permission::Leave
                };
            }
        }
        let mut forced = BTreeSet::new();
        for id in force {
            if self.nodes[id].permission != Permission::Run {
                return Err(PartsError::ForcedOutside {
                    name: self.stage(id).name.to_string(),
                    options: parts.restrictions(),
                });
            }
            forced.insert(id);
        }
        for id in forced {
            self.nodes[id].permission = Permission::Force;
        }
        Ok(())
    }

    /// All nodes that `next` leads to, the first ones included.
    fn reach(&self, first: Vec<NodeId>, next: impl Fn(&Node) -> Vec<NodeId>) -> BTreeSet<NodeId> {
        let mut reached: BTreeSet<NodeId> = first.iter().copied().collect();
        let mut open = first;
        while let Some(id) = open.pop() {
            open.extend(next(&self.nodes[id]).into_iter().filter(|&n| reached.insert(n)));
        }
        reached
    }
}

/// The nodes that a node reads from, with repetitions.
pub fn producers(node: &Node) -> impl Iterator<Item = NodeId> + '_ {
    node.sources.values().filter_map(|source| match source {
        Source::Output { node, .. } => Some(*node),
        Source::File(_) => None,
    })
}

/// How a pipeline is called in `out/`: `name` or `name@variant`.
pub fn title(pipeline: &Pipeline) -> String {
    match &pipeline.variant {
        Some(variant) => format!("{}@{variant}", pipeline.name),
        None => pipeline.name.clone(),
    }
}
