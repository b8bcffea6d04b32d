{{/* Names do not depend on the release. Programs and sidecars know them, and must find them after a reinstallation
under another release. Two installations in one cluster could not both be correct. */}}

{{/* The values that must not be null, except those that the schema requires. A test compares this with values.yaml. */}}
{{- define "credence.required" -}}
aws proxy images broker webhook sidecar certificates metrics tracing networkPolicy test
{{- range list "broker" "webhook" "sidecar" }} images.{{ . }} images.{{ . }}.repository{{ end -}}
{{- range $c := list "broker" "webhook" -}}
{{- range splitList " " "replicas serviceAccount serviceAccount.create podDisruptionBudget podDisruptionBudget.enabled podDisruptionBudget.maxUnavailable" }} {{ $c }}.{{ . }}{{ end -}}
{{- end -}}
{{- range splitList " " "audit stsRate settleTime maxGrantsPerNamespace tokenVerification maxTokenLife" }} broker.{{ . }}{{ end -}}
{{- range splitList " " "warnNotOptedIn port adminPort timeoutSeconds namespaceSelector" }} webhook.{{ . }}{{ end -}}
{{- range splitList " " "source issuerRef issuerRef.group issuerRef.kind duration renewBeforePercentage trustPropagation brokerSecret webhookSecret certManagerNamespace" }} certificates.{{ . }}{{ end -}}
{{- range list "serviceMonitor" "podMonitor" }} metrics.{{ . }} metrics.{{ . }}.interval{{ end }} metrics.prometheusRule metrics.prometheusRule.runbookURL metrics.grafanaDashboard sidecar.onShadowed tracing.ratio check.enabled check.timeout rbac rbac.viewer
{{- print " revisionHistoryLimit clusterName annotationPrefix audience logLevel images.pullPolicy runAsUser" }}
{{- end }}

{{/* The namespace of all namespaced objects. */}}
{{- define "credence.namespace" -}}
{{ default .Release.Namespace .Values.namespaceOverride }}
{{- end }}

{{/* Labels of every object. Takes (dict "root" $ "component" "broker"). */}}
{{- define "credence.labels" -}}
{{ include "credence.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: credence
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The labels that select pods. They can never change, because a Deployment's selector is immutable. */}}
{{- define "credence.selector" -}}
app.kubernetes.io/name: credence
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The name of a component's ServiceAccount. */}}
{{- define "credence.serviceAccountName" -}}
{{ default (printf "credence-%s" .component) (index .root.Values .component).serviceAccount.name }}
{{- end }}

{{/* An image's full name. Takes (dict "root" $ "image" .Values.images.broker). */}}
{{- define "credence.image" -}}
{{- $tag := .image.tag -}}
{{- if not (or $tag .image.digest) }}{{ $tag = .root.Chart.AppVersion }}{{ end -}}
{{- $repository := .image.repository -}}
{{- with (.root.Values.global).imageRegistry -}}
{{- /* As in references to images, the first component is a registry if it has a dot or a colon, or is localhost. */ -}}
{{- $path := splitList "/" $repository -}}
{{- if and (gt (len $path) 1) (regexMatch "[.:]|^localhost$" (first $path)) }}{{ $path = rest $path }}{{ end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) (join "/" $path) -}}
{{- end -}}
{{ $repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The Secrets for pulling the images of our own pods. Other charts write the global ones as names or as objects. */}}
{{- define "credence.pullSecrets" -}}
{{- $names := list -}}
{{- range concat (default list (.Values.global).imagePullSecrets) (default list .Values.images.pullSecrets) -}}
{{- $names = append $names (kindIs "string" . | ternary . (get (kindIs "map" . | ternary . dict) "name")) -}}
{{- end -}}
{{- with $names | uniq -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The last component of the sidecar's repository. The admission policy recognizes the sidecar by it. */}}
{{- define "credence.sidecarImageName" -}}
{{ last (splitList "/" .Values.images.sidecar.repository) }}
{{- end }}

{{/* The namespaces without injection, whatever their labels, as a JSON list. */}}
{{- define "credence.excludedNamespaces" -}}
{{- $names := list (include "credence.namespace" .) .Values.certificates.certManagerNamespace -}}
{{- if not .Values.webhook.allowKubeSystem }}{{ $names = append $names "kube-system" }}{{ end -}}
{{ $names | uniq | sortAlpha | toJson }}
{{- end }}

{{/* The seconds in a duration such as 2160h or 1h30m. */}}
{{- define "credence.seconds" -}}
{{- $seconds := 0 -}}
{{- range regexFindAll "[0-9]+[hms]" . -1 -}}
{{- $seconds = add $seconds (mul (int64 (regexFind "[0-9]+" .)) (get (dict "h" 3600 "m" 60 "s" 1) (regexFind "[hms]" .))) -}}
{{- end -}}
{{ $seconds }}
{{- end }}

{{/* The thousandths of a CPU in an amount such as 50m or 1. */}}
{{- define "credence.millis" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text }}{{ trimSuffix "m" $text }}{{ else }}{{ mul 1000 (int $text) }}{{ end -}}
{{- end }}
