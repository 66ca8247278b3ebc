// Renders conversations with Go's own text/template, from values of the shapes Ollama (0.14 and later) hands to it.
// Standard input: a JSON list of {template, messages, tools, think}; standard output: a list of what came of each.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type arguments map[string]any

func (a arguments) String() string { return marshal(a) }

type call struct {
	ID       string
	Function struct {
		Name      string
		Arguments arguments
	}
}

type message struct {
	Role, Content, Thinking string
	ToolCalls               []call `json:"tool_calls"`
	ToolName                string `json:"tool_name"`
}

type property struct {
	AnyOf       []property          `json:"anyOf,omitempty"`
	Type        any                 `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]property `json:"properties,omitempty"`
}

type parameters struct {
	Type       string              `json:"type"`
	Defs       any                 `json:"$defs,omitempty"`
	Items      any                 `json:"items,omitempty"`
	Required   []string            `json:"required,omitempty"`
	Properties map[string]property `json:"properties"`
}

type function struct {
	Name        string     `json:"name"`
	Description string     `json:"description"`
	Parameters  parameters `json:"parameters"`
}

type tool struct {
	Type     string   `json:"type"`
	Items    any      `json:"items,omitempty"`
	Function function `json:"function"`
}

type tools []tool

func (t tools) String() string { return marshal(t) }

type question struct {
	Template string
	Messages []message
	Tools    tools
	Think    *bool
}

type answer struct {
	Text, Error string
	Thinking    []string // the texts around .Thinking
	Calls       string   // the first text inside the first `if .ToolCalls`
}

func marshal(value any) string {
	written, _ := json.Marshal(value)
	return string(written)
}

func main() {
	var questions []question
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		panic(err)
	}
	answers := make([]answer, len(questions))
	for i, q := range questions {
		answers[i] = ask(q)
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}

func ask(q question) (a answer) {
	made, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": marshal}).Parse(q.Template)
	if err != nil {
		return answer{Error: err.Error()}
	}
	var written strings.Builder
	system, messages := joined(q.Messages)
	if err := made.Execute(&written, map[string]any{
		"System": system, "Messages": messages, "Tools": q.Tools, "Response": "",
		"Think": q.Think != nil && *q.Think, "ThinkLevel": "", "IsThinkSet": q.Think != nil,
	}); err != nil {
		return answer{Error: err.Error()}
	}
	a.Text = written.String()
	walk(made.Root, nil, &a)
	return a
}

// joined gathers the system texts, and makes one message of several of a role in a row, results apart.
func joined(given []message) (string, []*message) {
	var system []string
	var kept []*message
	for i := range given {
		m := &given[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(kept); n > 0 && kept[n-1].Role == m.Role && m.Role != "tool" {
			kept[n-1].Content += "\n\n" + m.Content
		} else {
			kept = append(kept, m)
		}
	}
	return strings.Join(system, "\n\n"), kept
}

// walk looks for what Ollama looks for in a template; over holds the nodes above n.
func walk(n parse.Node, over []parse.Node, a *answer) {
	over = append(over[:len(over):len(over)], n)
	var branch *parse.BranchNode
	switch n := n.(type) {
	case *parse.ListNode:
		for _, child := range n.Nodes {
			walk(child, over, a)
		}
	case *parse.ActionNode:
		walk(n.Pipe, over, a)
	case *parse.PipeNode:
		for _, command := range n.Cmds {
			for _, argument := range command.Args {
				walk(argument, over, a)
			}
		}
	case *parse.FieldNode:
		if n.Ident[0] == "Thinking" {
			around(over, a)
		}
	case *parse.IfNode:
		branch = &n.BranchNode
		if a.Calls == "" && names(n.Pipe, "ToolCalls") {
			a.Calls = "-"
			if found := firstText(n.List); found != "" {
				a.Calls = found
			}
		}
	case *parse.WithNode:
		branch = &n.BranchNode
	case *parse.RangeNode:
		branch = &n.BranchNode
	}
	if branch != nil {
		walk(branch.Pipe, over, a)
		walk(branch.List, over, a)
		if branch.ElseList != nil {
			walk(branch.ElseList, over, a)
		}
	}
}

// around takes the texts at both ends of the innermost list, if the innermost range goes over .Messages.
func around(over []parse.Node, a *answer) {
	ranged := false
	for i := len(over) - 1; i >= 0 && !ranged; i-- {
		if r, ok := over[i].(*parse.RangeNode); ok {
			ranged = true
			if !names(r.Pipe, "Messages") {
				return
			}
		}
	}
	for i := len(over) - 1; i >= 0 && ranged; i-- {
		list, ok := over[i].(*parse.ListNode)
		if !ok {
			continue
		}
		if len(a.Thinking) == 0 {
			a.Thinking = []string{"", ""}
		}
		for end, node := range []parse.Node{list.Nodes[0], list.Nodes[len(list.Nodes)-1]} {
			if text, ok := node.(*parse.TextNode); ok {
				a.Thinking[end] = strings.TrimSpace(string(text.Text))
			}
		}
		return
	}
}

func names(pipe *parse.PipeNode, field string) bool {
	for _, command := range pipe.Cmds {
		for _, argument := range command.Args {
			if found, ok := argument.(*parse.FieldNode); ok && found.Ident[len(found.Ident)-1] == field {
				return true
			}
		}
	}
	return false
}

// firstText is the first text of a list, looked for inside its blocks but never past an action.
func firstText(list *parse.ListNode) string {
	for _, node := range list.Nodes {
		switch n := node.(type) {
		case *parse.TextNode:
			return string(n.Text)
		case *parse.RangeNode:
			return firstText(n.List)
		case *parse.IfNode:
			return firstText(n.List)
		case *parse.WithNode:
			return firstText(n.List)
		case *parse.ActionNode:
			return ""
		}
	}
	return ""
}
